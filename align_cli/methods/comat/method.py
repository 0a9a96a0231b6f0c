"""CoMat: draw a picture with gradient in some steps; is it what the prompt says, does every word look at its
own thing, and does it still look like the original model's?

Source: arXiv 2404.03653 and github.com/CaraJ7/CoMat (commit 5eadcce). Deviations, each deliberate:
- Noise is seeded, and differs between processes; the random steps are the same on all, as there.
- Exactly grad_steps steps carry gradient, also where their number does not divide that of all steps.
- SDXL's rewards see pictures in [0, 1] (`official_range` restores the bug); nouns are found as a reader would
  (`entities` official restores the rest); SAM in place of FastSAM.
- The discriminator may share the denoiser in training, whose weights are frozen for both.
- Also, beyond it: SD2.x, any UNet of its kind, SD3 (whose path is Euler's, and whose maps are those of
  `models.attention`), more than one process with the loss of one (but for `norm_grad`, whose norm is that of
  a process's own pictures, as there).

Letters: B prompts of this process, C h w latent, H W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from align_cli import registry
from align_cli.adapters import load_adapter_of
from align_cli.diffusion.rollout import rollout
from align_cli.errors import UserError
from align_cli.grounding.entities import EntityReader
from align_cli.grounding.masks import Masker, MaskRequest
from align_cli.grounding.parsing import load_parser
from align_cli.losses import with_gradient
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.comat.concentration import Words
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.discriminator import LatentDiscriminator
from align_cli.methods.comat.matching import CROPPED, ConceptMatching, Crop
from align_cli.models.attention import AttentionMaps, check_layers, watched
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.lora import attention_lora
from align_cli.models.moving import moved_weights
from align_cli.rewards.base import Reward
from align_cli.rewards.weighted import WeightedRewards, load_rewards
from align_cli.sampling import check_side
from align_cli.settings import ModelSettings, TrainSettings


@dataclass(frozen=True)
class Plan:
    """What a step draws at random besides noise. gradient: sampling steps with gradient, 0 is the noisiest.
    attention: those of them whose attention is looked at. crop: what rewards see.
    """

    gradient: tuple[int, ...]
    attention: frozenset[int] = frozenset()
    crop: Crop = None


@dataclass
class Drawn:
    """A batch of training pictures. latents: (B, C, h, w), with graph. words: None where no attention was
    looked at; kept: of every step where it was.
    """

    latents: Tensor
    words: Words | None = None
    kept: list[AttentionMaps] = field(default_factory=list)


class CoMat:
    """Concept matching, attribute concentration, fidelity; follows `align_cli.methods.base.Method`."""

    name: ClassVar[str] = "comat"
    config_class: ClassVar[type] = CoMatConfig
    families: ClassVar[frozenset[str]] = frozenset({"sd15", "sd21", "sdxl", "sd3"})

    def __init__(self, model: BaseModel, config: CoMatConfig, *, seed: int = 0) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.lora = attention_lora(
            model.denoiser, config.lora_rank, seed=seed, setting="comat.lora_rank", model=model.model_id
        )
        self.discriminator: LatentDiscriminator | None = None
        self.reader: EntityReader | None = None
        self.masker: Masker | None = None
        self._rewards: WeightedRewards | None = None

    # ------------------------------------------------------------ before training

    @property
    def side(self) -> int:
        """Pixels of a training picture."""
        return self.config.image_size or self.model.image_size

    def check(self, settings: TrainSettings) -> None:
        """Load what only training needs: captioner, parser, what finds nouns in pictures, the discriminator,
        and the LoRA that it starts from.

        Raises:
            UserError: weights of one of these are missing or do not fit; a layer, a picture size or a number
            of steps that the model does not have.
        """
        c, model = self.config, self.model
        check_side(model, self.side, "comat.image_size")
        if c.steps > (most := model.process.num_train_timesteps):
            raise UserError(f"comat.steps must be at most {most} for {model.model_id}, got {c.steps}")
        for key, reason in c.idle().items():
            warnings.warn(f"{key} has no effect {reason}", stacklevel=2)
        if c.concentration:
            check_layers(
                model.denoiser,
                c.attention_layers,
                self.side // model.vae_factor,
                "comat.attention_layers",
                model.model_id,
            )
            self.look_for_nouns(*self._finders())
        if c.fidelity_weight:
            self.discriminate(self._discriminating_model(settings))
        if c.from_adapter:
            self._start_from(c.from_adapter)
        if c.concept:
            self.rewards  # noqa: B018

    def _finders(self) -> tuple[EntityReader, Masker]:
        c, model = self.config, self.model
        if model.reader is not None:
            raise UserError(
                "attribute concentration knows the tokens of prompts that are read plainly; give --set "
                "model.text=plain, or --set comat.attention_steps=0"
            )
        embedded = registry.is_embedded(model.model_id)
        parser = load_parser(c.parser, embedded=embedded)
        tokenizer, limit = model.words()
        reader = EntityReader(parser, tokenizer, limit=limit, official=c.entities == "official")
        name = ("shapes" if embedded else "grounded-sam") if c.masker == "auto" else c.masker
        request = MaskRequest(
            detector=c.detector,
            segmenter=c.segmenter,
            box_threshold=c.box_threshold,
            text_threshold=c.text_threshold,
            device=model.device,
            dtype=getattr(torch, c.reward_dtype),
        )
        return reader, registry.load(registry.MASKERS, name)(request)

    def look_for_nouns(self, reader: EntityReader, masker: Masker) -> None:
        """Find the nouns of prompts, and where they are in pictures, with these."""
        self.reader, self.masker = reader, masker

    def _discriminating_model(self, settings: TrainSettings) -> BaseModel:
        from align_cli.models.loading import load_model

        name, model = self.config.discriminator, self.model
        if not name:
            return model
        dtype = str(model.dtype).removeprefix("torch.")
        try:
            other = load_model(ModelSettings(name=name, dtype=dtype, device=str(model.device)))
        except UserError as error:
            raise UserError(f"comat.discriminator: {error}") from error
        flow, other_flow = (m.process.prediction_type == "flow" for m in (model, other))
        if flow != other_flow or other.latent_channels != model.latent_channels:
            kind, kinds = "UNet", ", ".join(sorted(self.families - {"sd3"}))
            if flow:
                kind, kinds = "transformer", "sd3"
            raise UserError(
                f"comat.discriminator {name}: it must be a {kind} for latents of "
                f"{model.latent_channels} channels (families {kinds}); it is {other.family} with "
                f"{other.latent_channels}"
            )
        if settings.gradient_checkpointing:
            unet: Any = other.denoiser
            unet.enable_gradient_checkpointing()
        return other

    def discriminate(self, model: BaseModel) -> None:
        """Learn to tell latents apart with the denoiser of `model`."""
        rank = self.config.discriminator_rank or self.config.lora_rank
        last = self.model.process.timesteps(self.config.steps, self.spacing)[-1].item()
        self.discriminator = LatentDiscriminator(model, rank=rank, timestep=last, seed=self.seed)
        if model is not self.model:
            model.offload_encoders()

    @property
    def spacing(self) -> str | None:
        """Of the path of a training picture: leading, as there; None for a flow, which has its own."""
        return None if self.model.process.prediction_type == "flow" else "leading"

    def _start_from(self, path: str) -> None:
        adapter = load_adapter_of(path, self.name, self.model.family, "comat.from_adapter")
        try:
            self.load_state(adapter.state)
        except ValueError as error:
            raise UserError(
                f"comat.from_adapter {path} does not fit: {error} (comat.lora_rank must be the same)"
            ) from error

    @property
    def rewards(self) -> WeightedRewards:
        """The frozen captioners and other rewards, on the denoiser's device."""
        if self._rewards is None:
            self.use_rewards(load_rewards(self.config, self.model.device))
        assert self._rewards is not None
        return self._rewards

    def use_rewards(self, rewards: Mapping[str, Reward]) -> None:
        """Match concepts with these, one for every name in the configuration, not with the published ones."""
        self._rewards = WeightedRewards(rewards, self.config.rewards)

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """generator: the LoRA. discriminator: its own, and its last layer; from `check` on."""
        groups = {"generator": self.lora.parameters()}
        if self.discriminator is not None:
            groups["discriminator"] = self.discriminator.parameters()
        return groups

    def group_options(self) -> dict[str, dict[str, float]]:
        """The discriminator's own optimiser."""
        c = self.config
        if self.discriminator is None:
            return {}
        own = {"adam_beta1": c.discriminator_beta1, "max_grad_norm": c.discriminator_grad_norm}
        return {"discriminator": own | {"lr": c.lr_discriminator}}

    # ------------------------------------------------------------ training

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """Pictures of the batch's prompts from fresh noise; see `learn`."""
        count, model, side = len(batch.prompts), self.model, self.side // self.model.vae_factor
        shape = (count * ctx.world_size, model.latent_channels, side, side)

        def noise() -> Tensor:
            return ctx.rows(torch.randn(*shape, generator=ctx.rng)).to(model.device)

        plan, start = self.plan(ctx.rng), noise()
        real = None
        if self.discriminator is not None:
            real = ctx.together(lambda: self._real(batch, noise), model.device)
        return self.learn(batch.prompts, start, noise, plan, real, ctx)

    def plan(self, rng: torch.Generator) -> Plan:
        """Source: training_utils/pipeline.py (equally spaced steps from a random start; of these, some with
        replacement), caption_blip.py (crop).
        """
        c = self.config

        def random(below: int) -> int:
            return int(torch.randint(below, (), generator=rng))

        interval = c.steps // c.grad_steps
        first = random(c.steps - interval * (c.grad_steps - 1))
        gradient = tuple(first + interval * k for k in range(c.grad_steps))
        looks = min(c.attention_steps, c.grad_steps) if c.concentration else 0
        attention = frozenset(gradient[random(len(gradient))] for _ in range(looks))
        margin = self.side // CROPPED
        crop = (random(margin + 1), random(margin + 1)) if c.crop and margin else None
        return Plan(gradient, attention, crop)

    def _real(self, batch: Batch, noise: Callable[[], Tensor]) -> Tensor:
        """Latents (B, C, h, w) that the original model made of the batch's prompts."""
        side = self.side // self.model.vae_factor
        if self.config.real == "drawn":
            with torch.no_grad():
                return self.draw(batch.prompts, noise(), noise, original=True).latents
        if batch.latents is None:
            raise UserError(
                "the data hold no latents of the original model; make them with t2ialign encode --for comat, "
                "or give --set comat.real=drawn or --set comat.fidelity_weight=0"
            )
        found = batch.latents.draw(None).float()
        if found.shape[1:] != (wanted := (self.model.latent_channels, side, side)):
            raise UserError(
                f"the stored latents have the shape {list(found.shape[1:])}, training pictures "
                f"{list(wanted)} (comat.image_size {self.side}); encode them at this size"
            )
        return found

    def draw(
        self,
        prompts: list[str],
        start: Tensor,
        noise: Callable[[], Tensor],
        plan: Plan | None = None,
        *,
        original: bool = False,
    ) -> Drawn:
        """The path from noise `start` (B, C, h, w) to clean latents, by DDPM; of SD3 by Euler's steps, which
        draw no noise.

        Args:
            noise: gives that of a step. plan: None for no gradient. original: without the LoRA.
        """
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            cond = self.model.encode_text(prompts)
            # also SDXL's: training encodes the empty prompt, drawing takes zeros
            empty = self.model.encode_text([""])[[0] * len(prompts)] if self.config.guidance != 1 else None
        words = self._words(prompts) if plan is not None and plan.attention else None
        return self.draw_encoded(cond, empty, start, noise, plan, words=words, original=original)

    def draw_encoded(
        self,
        cond: TextCond,
        empty: TextCond | None,
        start: Tensor,
        noise: Callable[[], Tensor],
        plan: Plan | None = None,
        *,
        words: Words | None = None,
        original: bool = False,
    ) -> Drawn:
        """`draw` of encoded prompts, B rows each."""
        model, c, kept = self.model, self.config, list[AttentionMaps]()
        plan = plan or Plan(())
        path = model.process.timesteps(c.steps, self.spacing).tolist()
        looked = {path[i] for i in plan.attention} if words is not None and words.count else set()
        # in float32 the LoRA is as good as merged where it needs no gradient, and costs nothing
        merged = self.lora.moved() if not original and model.dtype == torch.float32 else None

        def predict(z: Tensor, t: Tensor, text: TextCond) -> Tensor:
            if original:
                return model.predict(z, t, text)
            if not torch.is_grad_enabled():
                with moved_weights(model.denoiser, merged) if merged else self.lora.attached():
                    return model.predict(z, t, text)
            with self.lora.attached():
                if not looked or t.item() not in looked:
                    return model.predict(z, t, text)
                assert words is not None
                keep = AttentionMaps(c.attention_layers, words.positions)
                half = len(z) - len(start)
                told = model.predict(z[half:], t, text[half:], keep)
                kept.append(keep)
                return torch.cat([model.predict(z[:half], t, text[:half]), told]) if half else told

        latents = rollout(
            predict,
            model.process,
            start,
            steps=c.steps,
            guidance=c.guidance,
            spacing=self.spacing,
            sampler="ddpm" if self.spacing else None,
            cond=cond,
            uncond=empty,
            grad_steps=frozenset(plan.gradient),
            detach_input=c.detach_input,
            noise_fn=noise,
        )
        return Drawn(latents, words, kept)

    def _words(self, prompts: list[str]) -> Words:
        assert self.reader is not None, "check() or look_for_nouns() comes before training"
        return Words.of([self.reader.entities(prompt) for prompt in prompts], self.model.device)

    def learn(
        self,
        prompts: list[str],
        start: Tensor,
        noise: Callable[[], Tensor],
        plan: Plan,
        real: Tensor | None,
        ctx: StepContext,
    ) -> dict[str, float]:
        """Draw the prompts, and the gradients of generator and discriminator.

            L = -sum_k weight_k r_k + fidelity_weight G + token_weight token + pixel_weight pixel

        Args:
            start: (B, C, h, w) noise. noise: gives that of a sampling step. real: (B, C, h, w) latents of the
            original model, for the discriminator.
        Logs: loss; loss/NAME of its terms; reward/NAME; words/nouns and words/found, per picture, and the
        share of nouns that the picture shows; discriminator/loss, discriminator/right.
        Source: training_script.py.
        """
        c, told = self.config, dict[str, float]()
        with self._at_work(plan):
            # of one process alone a parser may refuse a prompt
            drawn = ctx.together(lambda: self.draw(prompts, start, noise, plan), start.device)
            z = drawn.latents
            loss, slope = z.new_zeros(()), torch.zeros_like(z)
            pictures: Tensor | None = None
            if c.concept or (drawn.words is not None and drawn.words.count):
                loss, slope, pictures = self._matched(z, prompts, plan, told, ctx)
            if self.discriminator is not None:
                fooled, towards = self._fooled(z, self.discriminator, ctx.loss_scale)
                loss, slope = loss + c.fidelity_weight * fooled, slope + c.fidelity_weight * towards
                told["loss/fidelity"] = float(fooled)
            total = with_gradient(loss, z, slope)
            if drawn.kept and pictures is not None:
                total = total + self._concentrated(drawn, pictures, told)
            elif plan.attention:  # no nouns: these count in the means over processes and slices
                told |= dict.fromkeys(("loss/token", "loss/pixel", "words/nouns"), 0.0)
            told["loss"] = float(total.detach())
            with self.lora.attached():
                ctx.backward(total, "generator")
            if self.discriminator is not None and real is not None:
                with self.discriminator.at_work():
                    own, right = self.discriminator.told_apart(z, real)
                    ctx.backward(own, "discriminator")
                told |= {"discriminator/loss": float(own.detach()), "discriminator/right": float(right)}
        return told

    @contextmanager
    def _at_work(self, plan: Plan) -> Iterator[None]:
        vae = self.model.vae
        try:
            if self.config.checkpoint_vae:
                vae.enable_gradient_checkpointing()
            with watched(self.model.denoiser) if plan.attention else nullcontext():
                yield
        finally:
            if self.config.checkpoint_vae:
                vae.disable_gradient_checkpointing()

    def _matched(
        self, z: Tensor, prompts: list[str], plan: Plan, told: dict[str, float], ctx: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss () of the rewards, its gradient in the latents, and the pictures (B, 3, H, W), detached."""
        if self.config.concept:
            matching = ConceptMatching(self.model, self.config, self.rewards)
            return matching.loss(z, prompts, plan.crop, told, ctx)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return z.new_zeros(()), torch.zeros_like(z), self.model.decode(z, clamp=False)

    def _fooled(
        self, z: Tensor, discriminator: LatentDiscriminator, loss_scale: float
    ) -> tuple[Tensor, Tensor]:
        """The adversarial loss () and its gradient in the latents; none reaches the discriminator."""
        leaf = z.detach().requires_grad_()
        with discriminator.at_work():
            fooled = discriminator.fooled(leaf)
            (slope,) = torch.autograd.grad(fooled * loss_scale, leaf)
        return fooled.detach(), slope / loss_scale

    def _concentrated(self, drawn: Drawn, pictures: Tensor, told: dict[str, float]) -> Tensor:
        """The weighted losses of attention (), with graph."""
        assert self.masker is not None and drawn.words is not None
        masker, words, c = self.masker, drawn.words, self.config
        shown = pictures * 2 - 1 if c.official_range else pictures
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            masks = masker.masks(shown.clamp(0, 1), words.nouns)
        token, pixel = words.losses(drawn.kept, masks)
        found = sum(int(mask.flatten(1).any(1).sum()) for mask in masks if mask is not None and len(mask))
        told |= {"loss/token": float(token.detach()), "loss/pixel": float(pixel.detach())}
        told |= {"words/nouns": words.count / len(pictures), "words/found": found / words.count}
        return c.token_weight * token + c.pixel_weight * pixel

    # ------------------------------------------------------------ the trained artefact

    def state(self) -> dict[str, Tensor]:
        """unet.LAYER of the LoRA, of SD3 transformer.LAYER; the discriminator is in the checkpoints alone."""
        return {f"{self.model.denoiser_part}.{key}": value for key, value in self.lora.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take trained tensors. ValueError naming missing, unused and wrongly shaped keys."""
        group = f"{self.model.denoiser_part}."
        stray = next((key for key in state if not key.startswith(group)), None)
        if stray is not None:
            raise ValueError(f"unused {stray}")
        self.lora.load_state({key.removeprefix(group): value for key, value in state.items()})

    @contextmanager
    def attach(self, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        """The LoRA moves the denoiser of `model` by `scale`."""
        with self.lora.merged(scale):
            yield
