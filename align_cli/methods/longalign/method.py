"""LongAlign: long captions read sentence by sentence, and preference training that leaves looks alone.

Source: arXiv 2410.11817 and github.com/luping-liu/LongAlign (commit 61a1021). Deviations, each deliberate:
- What does not run as released (T5 in the lcm stages, both reward stages) runs here: T5 gets whole captions.
- Everything that is not trained is frozen, also in reward-lcm. Noise, timesteps and dropout are seeded.
- align regresses what the model predicts (there always epsilon, wrong for velocity models).
- Tables of the schedule are float32 (there bfloat16).
- Pictures are decoded and scored a few at a time, which gives the gradient of all at once.
- Also, beyond it: SDXL, several weighted rewards, the stages without T5, more than one process with the
  common direction of one.

Letters: B prompts of this process, C h w latent, D width of the reward's towers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from align_cli.adapters import load_adapter_of
from align_cli.checks import require
from align_cli.diffusion.consistency import consistency
from align_cli.diffusion.rollout import rollout
from align_cli.errors import UserError
from align_cli.losses import (
    common_direction,
    denoising_error,
    huber_loss,
    preference_loss,
    reweight_text,
    with_gradient,
)
from align_cli.methods.base import Batch, StepContext, encoded_latents, latent_shape
from align_cli.methods.longalign.adapter import TextAdapter
from align_cli.methods.longalign.config import (
    ADAPTER,
    EARLIER,
    OWN,
    STANDS_ON,
    WITH_REWARD,
    LongAlignConfig,
)
from align_cli.methods.longalign.layers import longalign_layers
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.decoding import Judged, through_pictures
from align_cli.models.dropout import RowDropout
from align_cli.models.frozen import FrozenModel
from align_cli.models.lora import LoraTuning
from align_cli.models.segments import SegmentReader
from align_cli.models.states import LORA_A, by_group, check_state
from align_cli.models.t5 import T5Reader, load_t5
from align_cli.rewards.base import Reward
from align_cli.rewards.clip import ClipReward
from align_cli.rewards.preprocess import LONGALIGN_CROP
from align_cli.rewards.weighted import WeightedRewards, load_rewards
from align_cli.sampling import check_side
from align_cli.sentences import drop_captions
from align_cli.settings import TrainSettings


class LongAlign:
    """Segments of text into the denoiser, then rewards; follows `align_cli.methods.base.Method`."""

    name: ClassVar[str] = "longalign"
    config_class: ClassVar[type] = LongAlignConfig
    families: ClassVar[frozenset[str]] = frozenset({"sd15", "sd21", "sdxl"})

    def __init__(self, model: BaseModel, config: LongAlignConfig, *, seed: int = 0) -> None:
        self.model, self.config, self.seed = model, config, seed
        rng = torch.Generator().manual_seed(seed)
        self.loras = {OWN: self._lora(config.lora_rank, rng)}
        self.t5: T5Reader | None = None
        self.adapter: TextAdapter | None = None
        if config.t5:
            tokenizer, encoder = load_t5(config.t5, device=model.encoder_device, dtype=model.dtype)
            self.t5 = T5Reader(tokenizer, encoder, config.token_length)
            self.adapter = self._text_adapter(self.t5.width, config.adapter_width)
        self._rewards: WeightedRewards | None = None

    def _lora(self, rank: int, rng: torch.Generator | None = None) -> LoraTuning:
        return LoraTuning(
            self.model.denoiser, rank=rank, alpha=rank, targets=longalign_layers, init="gauss", rng=rng
        )

    def _text_adapter(self, read: int, between: int) -> TextAdapter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = TextAdapter(read, between, self.model.text_width)
        made.to(self.model.device).eval()
        return made.requires_grad_(self.config.stage == "align")

    # ------------------------------------------------------------ training

    def check(self, settings: TrainSettings) -> None:
        """Load what only training needs: the stage before, the text adapter to start from, the rewards.

        Raises:
            UserError: from_adapter is no adapter of LongAlign that fits; weights are missing.
        """
        c, most = self.config, self.model.process.num_train_timesteps
        if c.stage == "lcm":
            require(
                c.first_timestep < most,
                f"longalign.first_timestep must be below the {most} timesteps of {self.model.model_id}, got "
                f"{c.first_timestep}",
            )
        if c.stage in WITH_REWARD:
            require(
                c.steps <= most,
                f"longalign.steps must be at most {most} for {self.model.model_id}, got {c.steps}",
            )
            if settings.batch_size == 1 and c.omega < 1:
                warnings.warn(
                    "with --batch-size 1 the common direction is that of the one caption: no text-relevant "
                    "part is left, and longalign.omega decomposes nothing",
                    stacklevel=2,
                )
            check_side(self.model, c.image_size or self.model.image_size, "longalign.image_size")
            self.rewards  # noqa: B018
        if c.text_adapter and (c.stage != "align" or self.adapter is None):
            other = "takes that of --from" if c.stage != "align" else "reads CLIP alone"
            warnings.warn(f"longalign.text_adapter has no effect: stage {c.stage} {other}", stacklevel=2)
        elif c.text_adapter:
            given = TextAdapter.from_folder(c.text_adapter).state_dict()
            try:
                self._take_adapter(given)
            except ValueError as error:
                raise UserError(f"longalign.text_adapter {c.text_adapter} does not fit: {error}") from error
        if c.from_adapter:
            self._stand_on(c.from_adapter)

    def _stand_on(self, path: str) -> None:
        """Take the adapter of the stage before: its own LoRA gets the name of its stage."""
        setting = "longalign.from_adapter"
        adapter = load_adapter_of(path, self.name, self.model.family, setting)
        info, where = adapter.info, f"{setting} {path}"
        stage, mine = info.stage, self.config.stage
        if stage not in STANDS_ON[mine]:
            before = ", ".join(STANDS_ON[mine])
            raise UserError(f"{where}: an adapter of stage {stage}; stage {mine} stands on one of {before}")
        self._check_reading(info.config.get("longalign"), where)
        groups = by_group(adapter.state)
        groups[stage] = groups.pop(OWN, {})
        try:
            self._take(groups)
        except ValueError as error:
            raise UserError(f"{where} does not fit: {error}") from error

    def _check_reading(self, before: object, where: str) -> None:
        """UserError if the stage before read captions in another way: its weights know no other."""
        for key in ("token_length", "splitter"):
            now = getattr(self.config, key)
            then = before.get(key, now) if isinstance(before, Mapping) else now
            if then != now:
                raise UserError(
                    f"{where} was trained with longalign.{key} {then}, and this run has {now}; give --set "
                    f"longalign.{key}={then}"
                )

    @property
    def rewards(self) -> WeightedRewards:
        """The frozen rewards, on the denoiser's device; none in a stage without."""
        if self._rewards is None:
            climbs = self.config.stage in WITH_REWARD
            self.use_rewards(load_rewards(self.config, self.model.device) if climbs else {})
        assert self._rewards is not None
        return self._rewards

    def use_rewards(self, rewards: Mapping[str, Reward]) -> None:
        """Train on these scorers, one for every name in the configuration, in place of the published ones.

        Raises:
            UserError: one without text vectors, which alone can be decomposed.
        """
        for name, reward in rewards.items():
            if not isinstance(reward, ClipReward):
                raise UserError(
                    f"longalign.rewards: {name} has no text vectors to decompose; take denscore, clip, "
                    "pickscore or hpsv2, or train textcraftor on it"
                )
        self._rewards = WeightedRewards(rewards, self.config.rewards)

    @property
    def _towers(self) -> dict[str, ClipReward]:
        return cast("dict[str, ClipReward]", self.rewards.rewards)

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """One group, as officially its gradients are clipped together: the stage's LoRA, in align also the
        text adapter.
        """
        own = self.loras[OWN].parameters()
        trained = self.config.stage == "align" and self.adapter is not None
        return {self.config.stage: [*own, *(self.adapter.parameters() if trained and self.adapter else ())]}

    def group_options(self) -> dict[str, dict[str, float]]:
        return {}

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """One step of the stage; see `align`, `climb` and `distil`."""
        model, count = self.model, len(batch.prompts)
        prompts = self._dropped(batch.prompts, ctx)
        with self._training(count, ctx):
            if self.config.stage in WITH_REWARD:
                side = (self.config.image_size or model.image_size) // model.vae_factor
                noise = self._noise(count, (model.latent_channels, side, side), ctx)
                return self.climb(prompts, noise, ctx)
            shape = latent_shape(model, batch)
            latents = encoded_latents(model, batch, self._noise(count, shape, ctx))
            low = self.config.first_timestep if self.config.stage == "lcm" else 0
            high = model.process.num_train_timesteps
            t = ctx.rows(torch.randint(low, high, (count * ctx.world_size,), generator=ctx.rng))
            eps = self._noise(count, shape, ctx)
            work = self.distil if self.config.stage == "lcm" else self.align
            return work(prompts, latents, t.to(model.device), eps, ctx)

    def _noise(self, count: int, shape: tuple[int, ...], ctx: StepContext) -> Tensor:
        """(count, *shape): this process's rows of what is drawn for all."""
        drawn = torch.randn(count * ctx.world_size, *shape, generator=ctx.rng)
        return ctx.rows(drawn).to(self.model.device)

    def _dropped(self, prompts: list[str], ctx: StepContext) -> list[str]:
        """Some captions replaced by the empty one."""
        share = self.config.caption_dropout
        if share == 0:
            return prompts
        drawn = iter(ctx.rows(torch.rand(len(prompts) * ctx.world_size, generator=ctx.rng)).tolist())
        return drop_captions(prompts, share, lambda: next(drawn))

    def _told(self, prompts: list[str]) -> TextCond:
        """The captions as the denoiser reads them, not under autocast, as they are read for drawing. Where
        the unconditional text is zeros (SDXL), that of an empty caption is too: dropping captions trains it.
        """
        with self._own_precision():
            cond = self.model.encode_text(prompts)
        if not cast("FrozenModel", self.model).zeros_for_empty:
            return cond
        told = torch.tensor([float(text != "") for text in prompts]).to(cond.tokens)
        pooled = None if cond.pooled is None else cond.pooled * told[:, None]
        return TextCond(cond.tokens * told[:, None, None], pooled, cond.time_ids)

    def _untold(self, count: int) -> TextCond:
        """The unconditional text, as `_told`."""
        with self._own_precision():
            return self.model.uncond(count)

    def _own_precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, enabled=False)

    @contextmanager
    def _training(self, count: int, ctx: StepContext) -> Iterator[None]:
        """Inside, the model works with what is trained, under the dropout of training."""
        c, own = self.config, self.loras[OWN]
        with ExitStack() as stack:
            stack.enter_context(self._reading(self.model))
            for lora in self.loras.values():
                if lora is not own:
                    stack.enter_context(lora.merged())
            if c.stage != "lcm":  # there the teacher comes first, which goes without
                stack.enter_context(own.attached())
            if c.lora_dropout:
                stack.enter_context(
                    own.dropping(
                        ctx.rng, c.lora_dropout, rows=count, rank=ctx.rank, world_size=ctx.world_size
                    )
                )
            if c.stage == "align" and self.adapter is not None and c.adapter_dropout:
                dropout = RowDropout(c.adapter_dropout, count, ctx.rank, ctx.world_size)
                stack.enter_context(self.adapter.dropping(dropout))
            yield

    # ------------------------------------------------------------ align

    def align(
        self, prompts: list[str], latents: Tensor, t: Tensor, eps: Tensor, ctx: StepContext
    ) -> dict[str, float]:
        """Predict the noise of given pictures under their long captions.

            L = mean (prediction - target)^2, or huber

        latents, eps: (B, C, h, w). t: (B,) int64. Source: unet_align_ct5.py.
        """
        process = self.model.process
        cond = self._told(prompts)
        pred = self.model.predict(process.add_noise(latents, eps, t), t, cond)
        loss = self._distance(pred, process.target(latents, eps, t))
        ctx.backward(loss)
        return {"loss": float(loss.detach())}

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        if self.config.loss == "huber":
            return huber_loss(a, b, self.config.huber_c)
        return denoising_error(a, b).mean()

    # ------------------------------------------------------------ lcm

    def distil(
        self, prompts: list[str], latents: Tensor, t: Tensor, eps: Tensor, ctx: StepContext
    ) -> dict[str, float]:
        """What the student makes of z_t should be what it makes of the teacher's z_e, e = t - skip.

            f(z, t) = c_skip(t) z + c_out(t) x0(z, t);  L = distance(f(z_t, t), f(z_e, e) without gradient)

        The teacher is the student without the stage's LoRA, under guidance; there is no moving average.
        latents, eps: (B, C, h, w). t: (B,) int64. Source: unet_lcm.py.
        """
        c, model, process = self.config, self.model, self.model.process

        def consistent(z: Tensor, t: Tensor) -> Tensor:
            return consistency(process, model.predict(z, t, cond).float(), z, t)

        with torch.no_grad():
            cond, empty = self._told(prompts), self._untold(len(prompts))
            z, e = process.add_noise(latents, eps, t), (t - c.skip).clamp(min=0)
            rows = torch.cat([z, z]), torch.cat([t, t]), TextCond.cat([empty, cond])
            free, told = model.predict(*rows).float().chunk(2)
            guided = process.to_x0_eps(free + c.guidance * (told - free), z, t)
            before = process.add_noise(*guided, e)
        with self.loras[OWN].attached():
            with torch.no_grad():
                target = consistent(before, e)
            loss = self._distance(consistent(z, t), target)
            ctx.backward(loss)
        return {"loss": float(loss.detach())}

    # ------------------------------------------------------------ reward, reward-lcm

    def climb(self, prompts: list[str], noise: Tensor, ctx: StepContext) -> dict[str, float]:
        """Draw the prompts with gradient in some steps, and climb the decomposed rewards.

        noise: (B, C, h, w), where the pictures start. Logs: loss; reward/NAME, the mean score with the whole
        text; relevant/NAME, with its text-relevant part alone.
        Source: unet_reward.py, unet_reward_lcm.py.
        """
        z = self.draw(prompts, noise, ctx)
        loss, gradient, means = ctx.together(lambda: self._scored(z, prompts, ctx), z.device)
        ctx.backward(with_gradient(loss, z, gradient))
        return {"loss": float(loss)} | {name: float(mean) for name, mean in means.items()}

    def draw(self, prompts: list[str], noise: Tensor, ctx: StepContext) -> Tensor:
        """The clean prediction (B, C, h, w) of the last step, with the gradient of the chosen steps: through
        the arithmetic of the path to each prediction, never through the denoiser's input.
        """
        c, model = self.config, self.model
        few = c.stage == "reward-lcm"
        first = 0 if few else int(torch.randint(c.grad_stride, (), generator=ctx.rng))
        chosen = frozenset(range(first, c.steps, 1 if few else c.grad_stride))
        guidance = 1.0 if few else c.guidance
        with torch.no_grad():
            cond = self._told(prompts)
            empty = None if guidance == 1 else self._untold(len(prompts))
        return rollout(
            model.predict,
            model.process,
            noise,
            steps=c.steps,
            cond=cond,
            uncond=empty,
            guidance=guidance,
            spacing="trailing",
            sampler="lcm" if few else "ddim",
            grad_steps=chosen,
            detach_input=True,
            checkpoint=chosen,
            noise_fn=lambda: self._noise(len(noise), tuple(noise.shape[1:]), ctx),
            end="x0",
        )

    def _scored(
        self, z: Tensor, prompts: list[str], ctx: StepContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (), its gradient with respect to the latents z, and the mean scores."""
        c, count = self.config, len(prompts)
        crop = self._crop(z, ctx)
        texts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            for name, reward in self._towers.items():
                own = reward.text_vectors(prompts)
                direction = common_direction(ctx.gather(own))
                relevant = reweight_text(own, direction, 0.0)
                texts[name] = own, relevant, reweight_text(own, direction, c.omega)

        def judge(images: Tensor, rows: slice) -> Judged:
            images, share = crop(images), len(images) / count
            loss, means = z.new_zeros(()), {}
            for name, reward in self._towers.items():
                x = reward.image_vectors(images)
                whole, relevant, used = ((x * text[rows]).sum(-1) for text in texts[name])
                loss = loss + c.rewards[name] * share * preference_loss(used, c.omega)
                means[f"reward/{name}"] = whole.sum() / count
                means[f"relevant/{name}"] = relevant.sum() / count
            if not torch.isfinite(loss.detach()):
                raise UserError(
                    f"a reward ({', '.join(self._towers)}) is not finite for a picture of "
                    f"{prompts[rows][0]!r}; try other rewards, a lower --lr, or --set train.max_grad_norm=0.3"
                )
            return loss, means

        return through_pictures(self.model, z, judge, chunk=c.decode_chunk, loss_scale=ctx.loss_scale)

    def _crop(self, z: Tensor, ctx: StepContext) -> Callable[[Tensor], Tensor]:
        """The random crop that all pictures of the step share; none where they are not larger than it."""
        height, width = (n * self.model.vae_factor for n in z.shape[-2:])
        low = torch.rand(2, generator=ctx.rng)
        if self.config.reward_preprocessing != "longalign":
            return lambda images: images
        top, left = (
            int(r * (max(side - LONGALIGN_CROP, 0) + 1)) for r, side in zip(low, (height, width), strict=True)
        )
        return lambda images: images[..., top : top + LONGALIGN_CROP, left : left + LONGALIGN_CROP]

    # ------------------------------------------------------------ the trained artefact

    def state(self) -> dict[str, Tensor]:
        """adapter.KEY of the text adapter; unet.LAYER of the stage's own LoRA; align.LAYER, ... of those of
        the stages that it stands on.
        """
        found = {
            f"{group}.{key}": value
            for group, lora in self.loras.items()
            for key, value in lora.state().items()
        }
        if self.adapter is not None:
            found |= {
                f"{ADAPTER}.{key}": value.detach().cpu().contiguous().clone()
                for key, value in self.adapter.state_dict().items()
            }
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take trained tensors. ValueError naming missing, unused and wrongly shaped keys."""
        groups = by_group(state)
        if OWN not in groups:
            raise ValueError(f"missing {OWN}")
        self._take(groups)

    def _take(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Tensors by group. Earlier stages find their place before the stage's own LoRA."""
        if (ADAPTER in groups) != (self.adapter is not None):
            has, needs = ("a", "no") if ADAPTER in groups else ("no", "a")
            raise ValueError(
                f"it has {has} text adapter, and longalign.t5 {self.config.t5!r} goes with {needs}"
            )
        for name, state in groups.items():
            if name == ADAPTER:
                self._take_adapter(state)
            elif name == OWN:
                _load(self.loras[OWN], OWN, state)
            elif name in EARLIER:
                self.loras[name] = self._earlier(name, state)
            else:
                raise ValueError(f"unused {name}")
        self.loras = {name: self.loras[name] for name in (*EARLIER, OWN) if name in self.loras}

    def _earlier(self, name: str, state: Mapping[str, Tensor]) -> LoraTuning:
        ranks = {len(x) for key, x in state.items() if key.endswith(LORA_A)}
        if len(ranks) != 1:
            raise ValueError(f"{name} holds LoRA of {len(ranks)} ranks, expected one")
        lora = self._lora(ranks.pop())
        _load(lora, name, state)
        for p in lora.parameters():
            p.requires_grad_(False)
        return lora

    def _take_adapter(self, state: Mapping[str, Tensor]) -> None:
        """The width between its layers is that of the tensors."""
        assert self.adapter is not None and self.t5 is not None
        between = state.get("norm2.weight")
        if between is not None and len(between) != self.adapter.int_dim:
            self.adapter = self._text_adapter(self.adapter.in_dim, len(between))
        try:
            check_state({key: x.shape for key, x in self.adapter.state_dict().items()}, state)
        except ValueError as error:
            raise ValueError(f"{ADAPTER}: {error}") from error
        self.adapter.load_state_dict(dict(state))

    @contextmanager
    def attach(self, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        """At work on `model`: it reads segments, and the LoRAs of all stages move the denoiser by `scale`.
        With scale 0 it is untouched.
        """
        with ExitStack() as stack:
            if scale:
                stack.enter_context(self._reading(model))
                for lora in self.loras.values():
                    stack.enter_context(lora.merged(scale))
            yield

    @contextmanager
    def _reading(self, model: BaseModel) -> Iterator[None]:
        c, t5 = self.config, self.t5
        reader = SegmentReader(
            cast("FrozenModel", model),
            length=c.token_length,
            splitter=c.splitter,
            more=None if t5 is None else self._t5_rows,
            audit_more=None if t5 is None else t5.audit,
        )
        with model.reading(reader):
            yield

    def _t5_rows(self, prompts: list[str]) -> Tensor:
        """(B, token_length, D): T5 on whole captions, through the text adapter."""
        assert self.t5 is not None and self.adapter is not None
        rows: Tensor = self.adapter(self.t5.states(prompts).to(self.model.device))
        return rows


def _load(lora: LoraTuning, name: str, state: Mapping[str, Tensor]) -> None:
    try:
        lora.load_state(state)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
