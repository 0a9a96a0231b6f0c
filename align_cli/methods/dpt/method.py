"""DPT: how well does the model tell pictures and texts apart (probe), and does it draw better for it (tune)?

Source: arXiv 2403.04321 and github.com/LgQu/DPT-T2I. Deviations, each deliberate:
- The six passes of a step are one call of the denoiser, whose blocks beyond the feature see one pass alone.
- Matching is computed in float32 (there, in float16). `logit_scale` is carried from stage to stage.
- The random candidates are never the positive ones; see the datasets.
- Also, beyond it: SDXL, any UNet of its kind, more than one process with the loss of one. SD3: the feature is
  the picture's stream of its transformer on the grid of its patches, noise is on the straight path of flow
  matching, and the denoising loss is that of the velocity.

Letters: B examples of this process, P passes, R = B P rows in the order of the examples, C h w latent,
Q queries, D width of the text's summary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from align_cli.adapters import load_adapter_of
from align_cli.data.grounded import Grounded
from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess
from align_cli.errors import UserError
from align_cli.grounding.matching import Match, match
from align_cli.grounding.targets import Targets, make_targets
from align_cli.losses import (
    align_loss,
    box_losses,
    cardinality_error,
    denoising_error,
    matching_logits,
    matching_loss,
    snr_weighted_error,
    soft_token_loss,
)
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.dpt.config import DISCRIMINATOR, GROUNDING, DPTConfig, feature_names
from align_cli.methods.dpt.discriminator import Discriminator, Grounding
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.dropout import RowDropout
from align_cli.models.features import (
    alike_at_first,
    block_channels,
    blocks,
    check_blocks,
    observe,
    own_feature,
)
from align_cli.models.lora import LoraTuning, attention_lora
from align_cli.models.roberta import PhraseReader, load_roberta
from align_cli.models.states import by_group, check_state
from align_cli.settings import TrainSettings

TEXTS = ("expression", "caption", "hard", "random")
PICTURES = ("own", "hard", "random")
ARCHITECTURE = (
    "feature", "hidden_dim", "num_heads", "feedforward_dim", "num_encoder_layers", "num_decoder_layers",
    "pre_norm", "position", "num_matching_queries", "num_grounding_queries", "phrase_encoder", "phrase_dim",
)  # fmt: skip
"""Settings that tensors of a discriminator were made for."""
ROBERTA_WIDTH = 768
"""Of roberta-base; the tensors of an adapter, or the encoder of a training, say otherwise."""
PHRASES = "contrastive_align_projection_text.weight"
HALF_SCALE = 2.0**10
"""Factor that keeps gradients of a float16 denoiser in range."""


@dataclass(frozen=True)
class Pass:
    """One look of the discriminator: a picture, under a text as the denoiser's condition."""

    picture: str
    text: str


GROUND = Pass("own", "expression")
POSITIVE = Pass("own", "caption")
TEXTS_OF_ONE = (POSITIVE, Pass("own", "hard"), Pass("own", "random"))
PICTURES_OF_ONE = (POSITIVE, Pass("hard", "caption"), Pass("random", "caption"))


class DPT:
    """Discriminative probing and tuning; follows `align_cli.methods.base.Method`."""

    name: ClassVar[str] = "dpt"
    config_class: ClassVar[type] = DPTConfig
    families: ClassVar[frozenset[str]] = frozenset({"sd15", "sd21", "sdxl", "sd3"})

    def __init__(self, model: BaseModel, config: DPTConfig, *, seed: int = 0) -> None:
        self.model, self.config, self.seed = model, config, seed
        there = blocks(model.denoiser)
        check_blocks(
            model.denoiser,
            [config.detach_after] if config.detach_after else [],
            "dpt.detach_after",
            model.model_id,
        )
        self.feature = config.feature or own_feature(model.denoiser)
        self.names = feature_names(self.feature) or list(there)
        check_blocks(model.denoiser, self.names, "dpt.feature", model.model_id)
        channels = block_channels(model.denoiser)
        self.discriminator = Discriminator(
            config,
            channels=[channels[name] for name in self.names],
            text_dim=model.summary_width,
            phrase_width=ROBERTA_WIDTH,
            seed=seed,
        ).to(model.device)
        self.phrases: PhraseReader | None = None
        self.lora: LoraTuning | None = None
        if config.stage == "tune":
            self.lora = attention_lora(
                model.denoiser, config.lora_rank, seed=seed, setting="dpt.lora_rank", model=model.model_id
            )
        self.passes = self._passes()

    def _passes(self) -> tuple[Pass, ...]:
        """What a step needs, of the six: those of terms without weight are left out."""
        weight = self.config.weight
        found: dict[Pass, None] = {}
        if any(map(weight, GROUNDING)):
            found[GROUND] = None
        if weight("i2t") or (self.lora is not None and weight("denoise")):
            found[POSITIVE] = None
        if weight("i2t"):
            found |= dict.fromkeys(TEXTS_OF_ONE)
        if weight("t2i"):
            found |= dict.fromkeys(PICTURES_OF_ONE)
        return tuple(found)

    # ------------------------------------------------------------ training

    def check(self, settings: TrainSettings) -> None:
        """Load what only training needs: what reads phrases, and the tensors that it starts from.

        Raises:
            UserError: no phrase encoder there; from_adapter is no adapter of DPT that fits; a timestep beyond
                the model's.
        """
        c, most = self.config, self.model.process.num_train_timesteps
        for key in ("fixed_timestep", "eval_timestep"):
            if getattr(c, key) >= most:
                raise UserError(
                    f"dpt.{key} must be below the {most} timesteps of {self.model.model_id}, got "
                    f"{getattr(c, key)}"
                )
        if c.snr_gamma and isinstance(self.model.process, FlowProcess):
            raise UserError(
                f"dpt.snr_gamma is for noise schedules with alphas_cumprod; {self.model.model_id} is a flow: "
                "give --set dpt.snr_gamma=0"
            )
        joint = self.model.denoiser_part == "transformer"
        if joint and c.detach_after and c.stage == "tune" and settings.gradient_checkpointing:
            raise UserError(
                f"dpt.detach_after does not go with train.gradient_checkpointing on {self.model.model_id}, "
                "whose blocks are computed again as a whole; give one of them up"
            )
        for key, reason in c.idle(gradient_checkpointing=settings.gradient_checkpointing).items():
            warnings.warn(f"{key} has no effect {reason}", stacklevel=2)
        if c.stage == "tune" and not c.from_adapter:
            warnings.warn(
                "stage tune without --from starts from a random discriminator; the official way is stage "
                "probe first",
                stacklevel=2,
            )
        if GROUND in self.passes:
            device = self.model.encoder_device
            self.use_phrases(load_roberta(c.phrase_encoder, device=device, dtype=torch.float32))
        if c.from_adapter:
            self._start_from(c.from_adapter)

    def use_phrases(self, phrases: PhraseReader) -> None:
        """Read expressions with this RoBERTa; what compares its states with queries starts at random."""
        self.phrases = phrases
        self._read_width(phrases.width)

    def _read_width(self, width: int) -> None:
        if self.discriminator.contrastive_align_projection_text.in_features != width:
            self.discriminator.read_phrases_of(width, self.seed)

    def _start_from(self, path: str) -> None:
        setting = "dpt.from_adapter"
        adapter = load_adapter_of(path, self.name, self.model.family, setting)
        where, groups = f"{setting} {path}", by_group(adapter.state)
        if self.model.denoiser_part in groups and self.lora is None:
            raise UserError(
                f"{where}: it holds LoRA, which stage probe has no use for; go on with --stage tune"
            )
        before = adapter.info.config.get(self.name, {})
        for key in ARCHITECTURE:
            then, now = before.get(key, getattr(self.config, key)), getattr(self.config, key)
            if key == "feature":  # one that is not named is the model's own
                then, now = then or own_feature(self.model.denoiser), self.feature
            if then != now:
                raise UserError(
                    f"{where} was trained with dpt.{key} {then!r}, and this run has {now!r}; give --set "
                    f"dpt.{key}={then}"
                )
        try:
            self._take(groups)
        except ValueError as error:
            raise UserError(f"{where} does not fit: {error}") from error

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """One group, which is clipped as a whole."""
        own = [] if self.lora is None else self.lora.parameters()
        if self.lora is not None and self.config.only_lora:
            self.discriminator.requires_grad_(False)
            return {"dpt": own}
        return {"dpt": [*self.discriminator.parameters(), *own]}

    def group_options(self) -> dict[str, dict[str, float]]:
        return {}

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """The six passes, and the weighted sum of the losses.

        Logs: loss; loss/NAME of each term; probe/i2t and probe/t2i, the shares of examples whose positive
        candidate has the highest score (of three); probe/cardinality, how far the number of found objects
        is off.
        """
        told = [cast("Grounded", x) for x in batch.extra["grounded"]]
        latents = self._latents(batch, told, ctx)
        t = self._timesteps(len(told), ctx)
        eps = self._noise((len(told), *latents.shape[2:]), ctx)
        if self.config.noise_offset:
            constant = self._noise((len(told), latents.shape[2], 1, 1), ctx)
            eps = eps + self.config.noise_offset * constant
        texts = [
            text
            for p, g in zip(batch.prompts, told, strict=True)
            for text in (g.expression, p, g.hard_prompt, g.random_prompt)
        ]
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            cond, summaries = self.model.summarised(texts)
        dropout = None
        if self.config.dropout and not self.config.only_lora:
            rows = len(told) * len(self.passes)
            dropout = RowDropout(self.config.dropout, rows, ctx.rank, ctx.world_size)
        with self.discriminator.dropping(dropout), self._tuned():
            return self.learn(told, latents, t, eps, cond, summaries.unflatten(0, (-1, len(TEXTS))), ctx)

    def learn(
        self,
        told: list[Grounded],
        latents: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: TextCond,
        summaries: Tensor,
        ctx: StepContext,
    ) -> dict[str, float]:
        """Losses of given pictures at a given noise level, and their gradient.

        Args:
            latents: (B, 3, C, h, w) clean, of the own, the hard and the random picture. t: (B,) int64. eps:
            (B, C, h, w), shared by all three. cond: B times 4 rows, of expression, caption, hard and random
            caption. summaries: (B, 4, D) of these.
        """
        count, process = len(told), self.model.process
        states, prediction = self.look(latents, t, eps, cond)
        terms: dict[str, Tensor] = {}
        found: dict[str, float] = {}
        if GROUND in self.passes:
            terms |= self._grounding_terms(self.of(states, GROUND), told, found, ctx)
        embeddings = self.discriminator.matching(states)[0].float().unflatten(0, (count, -1))
        for name, candidates in (("i2t", TEXTS_OF_ONE), ("t2i", PICTURES_OF_ONE)):
            if self.config.weight(name):
                rows = [self.passes.index(one) for one in candidates]
                columns = [TEXTS.index(one.text) for one in candidates]
                scores = matching_logits(embeddings[:, rows], summaries[:, columns].float())
                terms[name] = matching_loss(scores, self.discriminator.logit_scale)
                found[f"probe/{name}"] = float((scores.argmax(1) == 0).float().mean())
        if prediction is not None:
            target = process.target(latents[:, 0], eps, t)
            if isinstance(process, FlowProcess):
                terms["denoise"] = denoising_error(prediction, target).mean()
            else:
                abar = cast("NoiseProcess", process).abar(t, eps).flatten()
                snr = abar / (1 - abar)
                terms["denoise"] = snr_weighted_error(prediction, target, snr, self.config.snr_gamma)
        loss = torch.stack([self.config.weight(name) * term for name, term in terms.items()]).sum()
        ctx.backward(loss)
        return (
            {"loss": float(loss.detach())}
            | {f"loss/{k}": float(x.detach()) for k, x in terms.items()}
            | found
        )

    def look(self, latents: Tensor, t: Tensor, eps: Tensor, cond: TextCond) -> tuple[Tensor, Tensor | None]:
        """States (layers, R, Q, d) of all passes, and the prediction (B, C, h, w) of the positive one, None
        where there is no use for it.
        """
        count, number, device = len(latents), len(self.passes), t.device
        pictures = [PICTURES.index(p.picture) for p in self.passes]
        text = _places(count, len(TEXTS), [TEXTS.index(p.text) for p in self.passes], device)
        times = t.repeat_interleave(number)
        noisy = self.model.process.add_noise(
            latents[:, pictures].flatten(0, 1), eps.repeat_interleave(number, 0), times
        )
        to_end = None
        if self.lora is not None and self.config.weight("denoise"):
            to_end = slice(self.passes.index(POSITIVE), None, number)
        with ExitStack() as stack:
            if self.lora is None:
                stack.enter_context(torch.no_grad())
            if cond.pooled is None:  # before the first cross-attention the texts make no difference
                kinds = sorted(set(pictures))
                first = _places(count, number, [pictures.index(kind) for kind in kinds], device)
                again = _places(count, len(kinds), [kinds.index(one) for one in pictures], device)
                stack.enter_context(alike_at_first(self.model.denoiser, first, again))
            seen, prediction = observe(
                self.model.denoiser,
                self.names,
                lambda: self.model.predict(noisy, times, cond[text]),
                to_end=to_end,
                detach_after=self.config.detach_after,
            )
        states = self.discriminator(self.discriminator.features(seen), times)
        return states, prediction

    def of(self, states: Tensor, one: Pass) -> Tensor:
        """(layers, B, Q, d) of one pass."""
        return states[:, self.passes.index(one) :: len(self.passes)]

    def _grounding_terms(
        self, states: Tensor, told: list[Grounded], found: dict[str, float], ctx: StepContext
    ) -> dict[str, Tensor]:
        assert self.phrases is not None, "check() or use_phrases() comes before training"
        c, device = self.config, states.device
        encoding = self.phrases.read([g.expression for g in told])
        targets = make_targets(encoding, [g.boxes for g in told], [g.spans for g in told]).to(device)
        said = self.discriminator.grounding(states)
        tokens = self.discriminator.phrase_tokens(self.phrases.states(encoding).to(device))
        matches = ctx.together(lambda: self._matched(said, targets), device)
        total = ctx.gather(torch.tensor([float(len(targets.boxes))], device=device)).sum()
        count = max(float(total) / ctx.world_size, 1.0)
        box, overlap = box_losses(said.boxes, matches, targets, count)
        found["probe/cardinality"] = float(cardinality_error(said.logits, targets))
        return {
            "class": soft_token_loss(said.logits, matches, targets, count, c.no_object_weight),
            "box": box,
            "giou": overlap,
            "align": align_loss(said.queries, tokens, matches, targets, count, c.temperature),
        }

    def _matched(self, said: Grounding, targets: Targets) -> list[Match]:
        c = self.config
        try:
            return match(
                said.logits,
                said.boxes,
                targets,
                class_weight=c.match_class,
                box_weight=c.match_box,
                giou_weight=c.match_giou,
            )
        except ValueError as error:
            raise UserError(f"{error}; try a lower --lr, or --set train.precision=fp32") from error

    def _latents(self, batch: Batch, told: list[Grounded], ctx: StepContext) -> Tensor:
        """(B, 3, C, h, w) of the own, the hard and the random picture, each drawn from its posterior."""
        if batch.pixels is None:
            raise ValueError("dpt trains on pixels")
        device = self.model.device
        others = [torch.stack([getattr(g, key) for g in told]) for key in ("hard_pixels", "random_pixels")]
        pixels = torch.stack([batch.pixels, *(x.to(device) for x in others)], dim=1).flatten(0, 1)
        side = [n // self.model.vae_factor for n in pixels.shape[-2:]]
        noise = self._noise((len(told), len(PICTURES), self.model.latent_channels, *side), ctx)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            latents = self.model.encode_image(pixels, noise.flatten(0, 1))
        return latents.unflatten(0, (-1, len(PICTURES)))

    def _timesteps(self, count: int, ctx: StepContext) -> Tensor:
        fixed, most = self.config.fixed_timestep, self.model.process.num_train_timesteps
        drawn = ctx.rows(torch.randint(most, (count * ctx.world_size,), generator=ctx.rng))
        return (drawn if fixed < 0 else torch.full_like(drawn, fixed)).to(self.model.device)

    def _noise(self, shape: tuple[int, ...], ctx: StepContext) -> Tensor:
        """This process's rows of what is drawn for all."""
        drawn = torch.randn(shape[0] * ctx.world_size, *shape[1:], generator=ctx.rng)
        return ctx.rows(drawn).to(self.model.device)

    def _tuned(self) -> Any:
        return nullcontext() if self.lora is None else self.lora.attached()

    # ------------------------------------------------------------ what it says of pictures

    def matching(self, z_t: Tensor, t: Tensor, told: list[str] | TextCond) -> Tensor:
        """Matching embeddings (B, Qm, D) of noisy latents (B, C, h, w) at t (B,), each under its prompt, or
        under what the model has made of it; they are compared with the summaries of `model.summarised`.
        """
        cond = told if isinstance(told, TextCond) else self.model.summarised(told)[0]
        return self.discriminator.matching(self._states(z_t, t, cond))[0].float()

    def ground(self, z_t: Tensor, t: Tensor, expressions: list[str]) -> tuple[Tensor, Tensor]:
        """Boxes (B, Qr, 4), centres and sizes, and their scores (B, Qr), for an expression each."""
        cond, _ = self.model.summarised(expressions)
        said = self.discriminator.grounding(self._states(z_t, t, cond))
        return said.boxes, said.scores

    def _states(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        seen, _ = observe(self.model.denoiser, self.names, lambda: self.model.predict(z_t, t, cond))
        found: Tensor = self.discriminator(self.discriminator.features(seen), t.expand(len(z_t)))
        return found

    # ------------------------------------------------------------ the trained artefact

    def state(self) -> dict[str, Tensor]:
        """discriminator.KEY by the official names, and unet.LAYER, of SD3 transformer.LAYER, of the LoRA of
        stage tune.
        """
        found = {
            f"{DISCRIMINATOR}.{key}": value.detach().cpu().contiguous().clone()
            for key, value in self.discriminator.state_dict().items()
        }
        if self.lora is not None:
            found |= {f"{self.model.denoiser_part}.{key}": value for key, value in self.lora.state().items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take trained tensors. ValueError naming missing, unused and wrongly shaped keys."""
        groups = by_group(state)
        if self.lora is not None and self.model.denoiser_part not in groups:
            raise ValueError(f"missing {self.model.denoiser_part}")
        self._take(groups)

    def _take(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        if DISCRIMINATOR not in groups:
            raise ValueError(f"missing {DISCRIMINATOR}")
        for name, state in groups.items():
            try:
                if name == DISCRIMINATOR:
                    if (given := state.get(PHRASES)) is not None:
                        self._read_width(given.shape[-1])
                    check_state({key: x.shape for key, x in self.discriminator.state_dict().items()}, state)
                    self.discriminator.load_state_dict(dict(state))
                elif name == self.model.denoiser_part and self.lora is not None:
                    self.lora.load_state(state)
                else:
                    raise ValueError("unused")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    @contextmanager
    def attach(self, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        """At work on `model`: the LoRA of stage tune moves the denoiser by `scale`; and the discriminator can
        correct the path of a picture, where sample.self_correct asks for it. With scale 0 it is untouched.
        """
        if scale == 0:
            yield
            return
        with nullcontext() if self.lora is None else self.lora.merged(scale):
            model.critics.append(self)
            try:
                yield
            finally:
                model.critics.remove(self)

    def judge(self, prompts: list[str]) -> Callable[..., tuple[Tensor, Tensor]]:
        """See `align_cli.models.base.Critic`."""
        with torch.no_grad():
            cond, summary = self.model.summarised(prompts)
        scale = HALF_SCALE if self.model.dtype == torch.float16 else 1.0

        def climb(z: Tensor, t: Tensor, *, dropout: bool = False) -> tuple[Tensor, Tensor]:
            drop = RowDropout(self.config.dropout) if dropout else None
            with torch.enable_grad(), self.discriminator.dropping(drop):
                leaf = z.detach().requires_grad_()
                embeddings = self.matching(leaf, t, cond)
                scores = matching_logits(embeddings[:, None], summary[:, None].float())[:, 0]
                (slope,) = torch.autograd.grad(scores.sum() * scale, leaf)
            return scores.detach(), slope / scale

        return climb


def _places(count: int, step: int, columns: list[int], device: torch.device) -> Tensor:
    """(count * len(columns),) places of these columns in `count` groups of `step` rows."""
    return (torch.arange(count)[:, None] * step + torch.tensor(columns)).flatten().to(device)
