"""TextCraftor: gradients of rewards, through the last sampling steps, into the text encoder (and the UNet).

Source: arXiv 2403.18978 and github.com/snap-research/textcraftor (commit bc211b3). Deviations, each
deliberate:
- Everything that is not trained is frozen (there, gradients pile up in the UNet and in the rewards).
- The noise is seeded. The split of the steps follows their number (`literal_split` restores the literal 25).
- PickScore is of matching pairs (`pickscore_pairing` restores the mean over the whole batch).
- Pictures are decoded and scored a few at a time, which gives the gradient of all at once.
- Also, beyond it: LoRA in place of all weights, SDXL and SD3, more than one process with the loss of one.

Letters: B prompts of this process, C h w latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from align_cli import config as configs
from align_cli.adapters import load_adapter_of
from align_cli.diffusion.rollout import rollout
from align_cli.errors import UserError
from align_cli.losses import with_gradient
from align_cli.methods.base import Batch, StepContext, encoded_text
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.decoding import Judged, through_pictures
from align_cli.models.lora import LoraTuning, most_rank
from align_cli.models.tuning import FullTuning, tuning_like
from align_cli.rewards.base import Reward
from align_cli.rewards.weighted import WeightedRewards, load_rewards
from align_cli.sampling import check_side
from align_cli.settings import TrainSettings

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of the text encoders in the pipelines of diffusers, in the order of `BaseModel.encoders`."""
CLIPS = 2
"""How many of them are CLIP towers at most; the third is T5."""


class TextCraftor:
    """Rewards into text encoders and denoiser; follows `align_cli.methods.base.Method`."""

    name: ClassVar[str] = "textcraftor"
    config_class: ClassVar[type] = TextCraftorConfig
    families: ClassVar[frozenset[str]] = frozenset({"sd15", "sd21", "sdxl", "sd3"})

    def __init__(self, model: BaseModel, config: TextCraftorConfig, *, seed: int = 0) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.denoiser_name = "transformer" if model.family == "sd3" else "unet"
        self.tunings: dict[str, FullTuning | LoraTuning] = {}
        if config.stage != "unet":
            self._tune(self._chosen_encoders())
        if config.stage != "text":
            self._tune([self.denoiser_name])
        self.trained = tuple(self.tunings)
        self._rewards: WeightedRewards | None = None

    def _chosen_encoders(self) -> list[str]:
        there = ENCODERS[: len(self.model.encoders)]
        stray = [name for name in self.config.encoders if name not in there]
        if stray:
            raise UserError(
                f"textcraftor.encoders: {self.model.model_id} has no {stray[0]} (it has {', '.join(there)})"
            )
        return list(self.config.encoders or there[:CLIPS])

    def _tune(self, names: list[str]) -> None:
        c = self.config
        for name in names:
            module, device = self._module(name), self._device(name)
            if not c.lora_rank:
                self.tunings[name] = FullTuning(module, device=device)
                continue
            if c.lora_rank > (most := most_rank(module)):
                raise UserError(
                    f"textcraftor.lora_rank must be at most {most}, the smaller side of the largest layer of "
                    f"the {name} of {self.model.model_id}, got {c.lora_rank}; 0 trains all weights"
                )
            rng = torch.Generator().manual_seed(self.seed)
            self.tunings[name] = LoraTuning(
                module, rank=c.lora_rank, alpha=c.lora_alpha or c.lora_rank, rng=rng, device=device
            )

    def _module(self, name: str) -> nn.Module:
        if name == self.denoiser_name:
            return self.model.denoiser
        return self.model.encoders[ENCODERS.index(name)]

    def _device(self, name: str) -> torch.device:
        """Where the module works."""
        return self.model.device if name == self.denoiser_name else self.model.encoder_device

    # ------------------------------------------------------------ training

    def check(self, settings: TrainSettings) -> None:
        """Load what only training needs: the rewards, and the tensors that it starts from.

        Raises:
            UserError: weights of a reward are missing; from_adapter is no adapter of TextCraftor that fits.
        """
        c = self.config
        check_side(self.model, c.image_size or self.model.image_size, "textcraftor.image_size")
        flow = self.model.process.prediction_type == "flow"
        if flow and c.spacing != type(c)().spacing:
            warnings.warn(f"textcraftor.spacing has no effect on {self.model.family}", stacklevel=2)
        if c.lr_unet and c.stage != "joint":
            warnings.warn("textcraftor.lr_unet has no effect: stage joint alone has two rates", stacklevel=2)
        if c.lora_alpha and not c.lora_rank:
            warnings.warn("textcraftor.lora_alpha has no effect without textcraftor.lora_rank", stacklevel=2)
        if c.encoders and c.stage == "unet":
            warnings.warn("textcraftor.encoders has no effect: stage unet trains none", stacklevel=2)
        if c.stage == "unet" and not c.from_adapter:
            warnings.warn(
                f"stage unet without --from trains the {self.denoiser_name} under the model's own text "
                "encoders",
                stacklevel=2,
            )
        if c.from_adapter:
            self._start_from(c.from_adapter)
        self.rewards  # noqa: B018

    def _start_from(self, path: str) -> None:
        setting = "textcraftor.from_adapter"
        adapter = load_adapter_of(path, self.name, self.model.family, setting)
        info, where = adapter.info, f"{setting} {path}"
        raw = {**info.config, "method": info.method}
        config = configs.Resolved.from_dict(raw, where=f"{where}: config").method_config
        other = type(self)(self.model, cast("TextCraftorConfig", config), seed=self.seed)
        if self.denoiser_name in other.tunings and self.denoiser_name not in self.tunings:
            raise UserError(
                f"{where}: it holds a tuned {self.denoiser_name}, which stage text has no use for; go on "
                "with --stage unet or --stage joint, or start from an adapter of stage text"
            )
        try:
            other.load_state(adapter.state)
            for name, tuning in other.tunings.items():
                mine = self.tunings.get(name) or self._carry(name, tuning.state())
                if isinstance(mine, LoraTuning) and isinstance(tuning, LoraTuning):
                    mine.load_state(tuning.state_for(mine.factor))
                else:
                    mine.load_state(tuning.state())
        except ValueError as error:
            raise UserError(
                f"{where} does not fit: {error} (textcraftor.lora_rank must be the same)"
            ) from error

    def _carry(self, name: str, state: Mapping[str, Tensor]) -> FullTuning | LoraTuning:
        """Make room for a tuned encoder that is used and saved, but not trained."""
        tuning = tuning_like(self._module(name), state, device=self._device(name))
        for p in tuning.parameters():
            p.requires_grad_(False)
        self.tunings[name] = tuning
        return tuning

    def group_options(self) -> dict[str, dict[str, float]]:
        """The denoiser's own learning rate, in stage joint."""
        c = self.config
        return {"unet": {"lr": c.lr_unet}} if c.lr_unet and c.stage == "joint" else {}

    @property
    def rewards(self) -> WeightedRewards:
        """The frozen rewards, on the denoiser's device."""
        if self._rewards is None:
            self.use_rewards(load_rewards(self.config, self.model.device))
        assert self._rewards is not None
        return self._rewards

    def use_rewards(self, rewards: Mapping[str, Reward]) -> None:
        """Train on these scorers, one for every name in the configuration, in place of the published ones."""
        self._rewards = WeightedRewards(rewards, self.config.rewards, self.config.pickscore_pairing)

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """text: all tuned encoders. unet: the denoiser."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name in self.trained:
            group = "unet" if name == self.denoiser_name else "text"
            groups.setdefault(group, []).extend(self.tunings[name].parameters())
        return groups

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """Pictures of the batch's prompts from fresh noise; see `climb`."""
        count, model = len(batch.prompts), self.model
        side = (self.config.image_size or model.image_size) // model.vae_factor
        shape = (model.latent_channels, side, side)
        noise = ctx.rows(torch.randn(count * ctx.world_size, *shape, generator=ctx.rng)).to(model.device)
        return self.climb(batch, noise, ctx)

    def climb(self, batch: Batch, noise: Tensor, ctx: StepContext) -> dict[str, float]:
        """Draw the prompts with gradient in the last steps, and climb the rewards.

            L = -sum_k weight_k mean_b r_k(picture_b, prompt_b)

        noise: (B, C, h, w), where the pictures start. Logs: loss; reward/NAME, the mean of every reward as it
        is.
        Source: paper eq. 7; train_textcraftor.py.
        """
        count, model = len(batch.prompts), self.model
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            frozen = encoded_text(model, batch), self._empty(count)
        with self._training():
            z = self._draw(batch.prompts, noise, *frozen)
            loss, gradient, means = ctx.together(lambda: self._scored(z, batch.prompts, ctx), z.device)
            ctx.backward(with_gradient(loss, z, gradient))
        return {"loss": float(loss)} | {f"reward/{name}": float(mean) for name, mean in means.items()}

    def _empty(self, count: int) -> TextCond | None:
        return None if self.config.guidance == 1 else self.model.uncond(count)

    def _draw(
        self, prompts: list[str], noise: Tensor, frozen: TextCond, frozen_empty: TextCond | None
    ) -> Tensor:
        """Clean latents (B, C, h, w) with the gradient of the last K steps, the model being in training."""
        c, model = self.config, self.model
        first = c.first_tuned(c.steps, c.grad_steps)
        tuned, tuned_empty = frozen, frozen_empty
        if list(self.tunings) != [self.denoiser_name]:
            tuned, tuned_empty = model.encode_text(prompts), self._empty(len(prompts))

        def cond(i: int) -> TextCond:
            return tuned if i >= first else frozen

        def uncond(i: int) -> TextCond:
            found = tuned_empty if i >= first else frozen_empty
            assert found is not None
            return found

        return rollout(
            model.predict,
            model.process,
            noise,
            steps=c.steps,
            guidance=c.guidance,
            spacing=None if model.process.prediction_type == "flow" else c.spacing,
            cond=cond,
            uncond=None if frozen_empty is None else uncond,
            grad_steps=frozenset(range(first, c.steps)),
            detach_input=c.detach_input,
            checkpoint=frozenset(range(first, c.steps - c.kept_steps)),
        )

    def _scored(
        self, z: Tensor, prompts: list[str], ctx: StepContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (), its gradient with respect to the latents z, and the means of the rewards."""
        count, rewards = len(prompts), self.rewards
        with torch.autocast(z.device.type, enabled=False):
            others = rewards.batch_text(prompts, ctx.gather)

        def judge(images: Tensor, rows: slice) -> Judged:
            scores = rewards.score(images, prompts[rows], others)
            means = {name: r.sum() / count for name, r in scores.items()}
            return -rewards.total(scores).sum() / count, means

        chunk = self.config.decode_chunk
        return through_pictures(self.model, z, judge, chunk=chunk, loss_scale=ctx.loss_scale)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Inside, the model works with what is trained."""
        with ExitStack() as stack:
            for name, tuning in self.tunings.items():
                stack.enter_context(self.standing_in(name, tuning))
            if self.config.checkpoint_vae:
                self.model.vae.enable_gradient_checkpointing()
                stack.callback(self.model.vae.disable_gradient_checkpointing)
            yield

    @contextmanager
    def standing_in(self, name: str, tuning: FullTuning | LoraTuning) -> Iterator[None]:
        """Inside, the model works with what was trained of its module `name`, as it is."""
        if isinstance(tuning, LoraTuning):
            with tuning.attached():
                yield
        elif name == self.denoiser_name:
            with self.model.using(denoiser=tuning.module):
                yield
        else:
            with self.model.using(encoders={ENCODERS.index(name): tuning.module}):
                yield

    # ------------------------------------------------------------ the trained artefact

    def state(self) -> dict[str, Tensor]:
        """Keys "<component>.<parameter>", components called as in diffusers: text_encoder, unet. Tuned text
        encoders of from_adapter that were not trained on are there, too.
        """
        return {
            f"{name}.{key}": value
            for name, tuning in self.tunings.items()
            for key, value in tuning.state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take trained tensors. ValueError naming missing, unused and wrongly shaped keys."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.tunings}
        carried = ENCODERS[: len(self.model.encoders)]
        for key, value in state.items():
            name, _, rest = key.partition(".")
            if name in self.tunings or name in carried:
                parts.setdefault(name, {})[rest] = value
            else:
                raise ValueError(f"unused {key}")
        for name, part in parts.items():
            try:
                (self.tunings.get(name) or self._carry(name, part)).load_state(part)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    @contextmanager
    def attach(self, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        """At work on `model`: embeddings of the tuned text encoders are mixed with its own in the steps that
        they are for, the denoiser's weights move by `scale`.
        """
        texts = {name: tuning for name, tuning in self.tunings.items() if name != self.denoiser_name}
        with ExitStack() as stack:
            if self.denoiser_name in self.tunings:
                stack.enter_context(self.tunings[self.denoiser_name].attached(scale))
            if texts:
                change = _TunedText(self, model, texts, scale)
                model.text_changes.append(change)
                stack.callback(model.text_changes.remove, change)
            yield


class _TunedText:
    """The tuned text encoders as a `models.base.TextChange`."""

    def __init__(
        self,
        method: TextCraftor,
        model: BaseModel,
        tunings: dict[str, FullTuning | LoraTuning],
        scale: float,
    ) -> None:
        self.method, self.model, self.tunings, self.scale = method, model, tunings, scale

    def first_step(self, steps: int) -> int:
        c = self.method.config
        return c.first_tuned(steps, c.test_grad_steps)

    def encode(self, prompts: list[str]) -> TextCond:
        with self.at_work():
            return self.model.encode_text(prompts)

    def uncond(self, batch: int) -> TextCond:
        with self.at_work():
            return self.model.uncond(batch)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See `align_cli.models.base.TextChange`."""
        with ExitStack() as stack:
            for name, tuning in self.tunings.items():
                stack.enter_context(self.method.standing_in(name, tuning))
            yield
