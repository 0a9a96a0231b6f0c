"""SoftREPA: learn a few soft text tokens so that each image is denoised best under its own caption.

Source: arXiv 2503.08250 and github.com/softrepa/SoftREPA (commit ff92f4b). Deviations, each deliberate:
- A batch cut into chunks of pairs gives the gradient of the whole batch. train_dist.py divides the mean of
every chunk of rows by the batch size, so that its gradient is 1 / nrows of that and a shorter last chunk
weighs more; and it drops dweight.
- Captions are contrasted over all processes: n processes give the loss of one. There, each process sees its
own only.
- Sampling uses the trained table (sample.py loads it into a name that nothing reads, and so uses random
numbers).
- `init` can break the symmetry of equal tokens, which otherwise stay equal for ever (the released SD1.5
tokens are).

Letters: I images of this process, G images of all processes, T candidate captions of an image (G and then the
hard negatives), C h w latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.losses import denoising_error, softrepa_terms, with_gradient
from align_cli.methods.base import Batch, StepContext, encoded_latents, encoded_text, latent_shape
from align_cli.methods.softrepa.config import TABLE_ROWS, SoftREPAConfig
from align_cli.methods.softrepa.pairs import pair_gradient
from align_cli.methods.softrepa.placement import PLACEMENTS, placement
from align_cli.methods.softrepa.tokens import SoftTokens
from align_cli.models.base import BaseModel, TextCond
from align_cli.settings import TrainSettings

FLAT_SPREAD = 0.005
"""Logit spread (std over captions) below which the contrastive gradient is next to nothing."""
FLAT_STEPS = 20
"""Steps whose mean spread decides about the warning: single steps at large t are flat in a healthy run."""


@dataclass(frozen=True)
class Contrast:
    """What `SoftREPA.contrast` measured, detached. err_IT: (I, T) float32; ce_I, own_I: (I,); logits_IT: (I,
    T).
    """

    err_IT: Tensor
    ce_I: Tensor
    own_I: Tensor
    logits_IT: Tensor


@dataclass
class _Flatness:
    """Watches whether the logits say anything."""

    spreads: list[float] = field(default_factory=list)
    done: bool = False

    def see(self, spread: float, error: float, temperature: float) -> None:
        if self.done:
            return
        self.spreads.append(spread)
        if len(self.spreads) < FLAT_STEPS:
            return
        self.done = True
        mean = sum(self.spreads) / FLAT_STEPS
        if mean < FLAT_SPREAD:
            warnings.warn(
                f"SoftREPA's logits are flat: mean spread {mean:.2g} over {FLAT_STEPS} steps (errors "
                f"of about {error:.2g} at "
                f"temperature {temperature:g}), so there is next to nothing to learn from; raise "
                "softrepa.temperature "
                f"towards the size of the errors",
                stacklevel=3,
            )


class SoftREPA:
    """Contrastive soft tokens for every family; follows `align_cli.methods.base.Method`.

    Where the tokens enter the denoiser, and how wide they are, is the business of `placement`.
    """

    name: ClassVar[str] = "softrepa"
    config_class: ClassVar[type] = SoftREPAConfig
    families: ClassVar[frozenset[str]] = frozenset(PLACEMENTS)

    def __init__(self, model: BaseModel, config: SoftREPAConfig, *, seed: int = 0) -> None:
        self.model, self.config = model, config
        self.placement = placement(model, config)
        self.tokens = self._start(seed).to(model.device)
        self._flatness = _Flatness()

    def _start(self, seed: int) -> SoftTokens:
        """Initial tokens; drawn on the CPU, so that every machine starts the same.

        Source: transformer.py (Normal(0, 0.02) for tokens and table), train.py (copies of the BOS encoding
        for SD1.5).
        """
        c, rng = self.config, torch.Generator().manual_seed(seed)
        shape = self.placement.token_shape
        noise = torch.randn(*shape, generator=rng) * c.init_noise
        table = None
        if c.use_t_table:
            table = torch.randn(TABLE_ROWS, self.placement.table_width, generator=rng) * c.init_noise
        if c.init == "normal":
            return SoftTokens(noise, table)
        with torch.no_grad():
            first = self.placement.project(self.model.encode_text([""]).tokens[0, 0]).float().cpu()
        copies = first.expand(shape)
        return SoftTokens(copies + noise * first.std() if c.init == "bos+noise" else copies, table)

    # ------------------------------------------------------------ training

    def check(self, settings: TrainSettings) -> None:
        """A warning for settings without effect on this family."""
        default = SoftREPAConfig()
        for key in self.placement.idle:
            if getattr(self.config, key) != getattr(default, key):
                warnings.warn(f"softrepa.{key} has no effect on {self.model.family}", stacklevel=2)

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """One group: tokens and, if used, the table."""
        return {"softrepa": list(self.tokens.parameters())}

    def group_options(self) -> dict[str, dict[str, float]]:
        """None: all as in [train]."""
        return {}

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """All pairs of the batch's images and captions, at one timestep for all.

        Logs (means over this process's images): loss, ce, err_own (E under the own caption), err_other,
        accuracy (own caption has the smallest error), spread (std of the logits over an image's captions).
        """
        c, model = self.config, self.model
        count = len(batch.prompts)
        total = count * ctx.world_size
        with torch.no_grad():
            shape = latent_shape(model, batch)
            t = torch.randint(c.min_t, c.max_t, (), generator=ctx.rng)
            posterior = ctx.rows(torch.randn(total, *shape, generator=ctx.rng))
            eps = ctx.rows(self._noise(total, shape, ctx.rng))
            latents = encoded_latents(model, batch, posterior).float()
            encoded = encoded_text(model, batch, self._negatives(batch))
            texts = _gathered(encoded[:count], ctx)
        own = torch.arange(count, device=latents.device) + ctx.rank * count
        eps = eps.to(latents.device)
        t = t.to(latents.device)
        result = self.contrast(latents, texts, eps, t, own, encoded[count:], ctx.backward, ctx.loss_scale)
        return self._report(result, own)

    def _noise(self, total: int, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """(total, C, h, w): the same noise in every row, or in `noise_rows` rows each."""
        each = self.config.noise_rows or total
        groups = -(-total // each)
        return torch.randn(groups, *shape, generator=rng).repeat_interleave(each, 0)[:total]

    def _negatives(self, batch: Batch) -> list[str]:
        """`hard_negatives` captions of every image, image by image."""
        wanted = self.config.hard_negatives
        if not wanted:
            return []
        given = batch.extra.get("negatives")
        if given is None or any(not isinstance(row, list) or len(row) < wanted for row in given):
            most = min((len(row) for row in given if isinstance(row, list)), default=0) if given else 0
            raise UserError(
                f"softrepa.hard_negatives is {wanted}, but the dataset gives {most} false captions "
                "per image; "
                f"use --set softrepa.hard_negatives={most}"
            )
        return [str(text) for row in given if isinstance(row, list) for text in row[:wanted]]

    def contrast(
        self,
        latents_I: Tensor,
        texts_G: TextCond,
        eps_I: Tensor,
        t: Tensor,
        own_I: Tensor,
        negatives: TextCond,
        backward: Callable[[Tensor], None],
        loss_scale: float = 1.0,
    ) -> Contrast:
        """Loss and gradient of this process's images, `pair_chunk` pairs at a time; see `pair_gradient`.

            E_ij = mean (target_i - model(z_t(x_i, eps_i), t, c_j, tokens))^2
            loss = mean_i softmax cross-entropy of 4 exp(-E_ij / 0.07) at j = own_i  +  dweight mean_i
            E_i,own_i

        Args:
            latents_I, eps_I: (I, C, h, w); eps may have one row for all. t: () int64. own_I: (I,) column of
            the own text.
            texts_G: candidates of every image. negatives: I * k more, k for each image alone, image by image.
            backward: called once, with the loss (). loss_scale: see `StepContext`.
        Source: train.py, class SoftREPA.
        """
        c, images, shared = self.config, len(latents_I), len(texts_G)
        noisy = self.model.process.add_noise(latents_I, eps_I, t)
        target = self.model.process.target(latents_I, eps_I.expand_as(latents_I), t)
        texts = TextCond.cat([texts_G, negatives]) if len(negatives) else texts_G
        columns = _columns(images, shared, len(negatives) // images).to(t.device)
        soft = self.placement.soft(self.model.denoiser, self.tokens, t)
        now, parts = [soft], []

        def errors(soft_P: Tensor, image_P: Tensor, text_P: Tensor) -> Tensor:
            now[0] = soft_P
            pred = self.model.predict(noisy[image_P], t, texts[text_P])
            return denoising_error(pred, target[image_P])

        def loss_of(err: Tensor, rows: slice) -> Tensor:
            terms = softrepa_terms(err, own_I[rows], temperature=c.temperature, logit_scale=c.logit_scale)
            parts.append([x.detach() for x in terms])
            return (terms.ce_I.sum() + c.dweight * terms.own_I.sum()) / images

        with self.placement.inserted(self.model.denoiser, lambda _t: now[0], 1.0):
            err, loss, gradient = pair_gradient(
                errors, soft, columns, loss_of, chunk=c.pair_chunk, scale=loss_scale
            )
        backward(with_gradient(loss, soft, gradient))
        ce, own, logits = (torch.cat(x) for x in zip(*parts, strict=True))
        return Contrast(err, ce, own, logits)

    def _report(self, result: Contrast, own: Tensor) -> dict[str, float]:
        c, err = self.config, result.err_IT
        others = (err.sum() - result.own_I.sum()) / (err.numel() - len(err))
        ce, diffusion = result.ce_I.mean(), result.own_I.mean()
        values = torch.stack(
            [
                ce + c.dweight * diffusion,
                ce,
                diffusion,
                others,
                (err.argmin(1) == own).float().mean(),
                result.logits_IT.std(1, unbiased=False).mean(),
            ]
        ).tolist()
        names = ("loss", "ce", "err_own", "err_other", "accuracy", "spread")
        self._flatness.see(values[5], values[2], c.temperature)
        return {f"softrepa/{name}": value for name, value in zip(names, values, strict=True)}

    # ------------------------------------------------------------ the trained artefact

    def state(self) -> dict[str, Tensor]:
        """dc_tokens and, with a table, dc_t_tokens, as in `SoftTokens`; float32, CPU."""
        return {k: v.detach().cpu().contiguous().clone() for k, v in self.tokens.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take trained tensors. ValueError naming missing, unused and wrongly shaped keys; then nothing is
        changed.
        """
        mine = self.tokens.state_dict()
        missing, unused = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        wrong = [
            f"{k} has shape {list(state[k].shape)}, expected {list(mine[k].shape)}"
            for k in sorted(mine.keys() & state.keys())
            if state[k].shape != mine[k].shape
        ]
        problems = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unused {', '.join(unused)}"] * bool(
            unused
        )
        if problems + wrong:
            raise ValueError("; ".join(problems + wrong))
        self.tokens.load_state_dict(state)

    @contextmanager
    def attach(self, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        """The tokens at work on `model`, in the conditional and the unconditional branch.

        scale: factor on the attention weight that the tokens get; 0 is exactly the base model, 1 as trained.
        """
        soft_at = partial(self.placement.soft, model.denoiser, self.tokens)
        with self.placement.inserted(model.denoiser, soft_at, scale):
            yield


def _columns(images: int, shared: int, extra: int) -> Tensor:
    """(I, T) numbers of every image's candidates: the shared texts, then its own `extra` negatives behind
    them.
    """
    own = shared + torch.arange(images * extra).view(images, extra)
    return torch.cat([torch.arange(shared).expand(images, -1), own], dim=1)


def _gathered(texts: TextCond, ctx: StepContext) -> TextCond:
    """The captions of all processes: every field that the family has."""

    def gather(x: Tensor | None) -> Tensor | None:
        return None if x is None else ctx.gather(x.contiguous())

    return TextCond(ctx.gather(texts.tokens.contiguous()), gather(texts.pooled), gather(texts.time_ids))
