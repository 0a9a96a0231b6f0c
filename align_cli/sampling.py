"""Draw pictures with a base model, adapters attached or not.

Shape letters: N pictures, B of them in one forward pass, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from align_cli.checks import require_multiple
from align_cli.diffusion.rollout import rollout
from align_cli.diffusion.samplers import samplers_of
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.conditioning import StepText
from align_cli.pictures import Note, contact_sheet, save_png
from align_cli.settings import OWN_SPACING, SampleSettings

__all__ = [
    "Note", "check_settings", "check_side", "contact_sheet", "draw_latents", "own_settings", "picture_seeds",
    "sample", "save_png",
]  # fmt: skip

Callback = Callable[[int, int], None]
"""Called as (done, total), both in pictures times denoising steps."""
Predict = Callable[[Tensor, Tensor, TextCond], Tensor]
"""`BaseModel.predict`, or what stands in its place: z_t, t and text, with guidance the unconditional half
first."""


@torch.no_grad()
def sample(
    model: BaseModel,
    prompts: Sequence[str],
    settings: SampleSettings,
    seeds: Sequence[int],
    callback: Callback | None = None,
    *,
    start_noise: Tensor | None = None,
    watch: Callable[[int, int], Predict] | None = None,
) -> Tensor:
    """One picture per prompt.

    Picture i depends on prompt i and seed i alone: all its noise comes from its own CPU generator, so neither
    the device, nor the batch size, nor its neighbours choose it. What remains are rounding errors that differ
    between batch sizes and hardware (float32 on one CPU: about 1e-6, seldom seen in a PNG).

    Args:
        prompts, seeds: N each.
        settings: sampler, number of steps, guidance, batch size; image_size 0 takes the model's own.
        start_noise: (N, C, h, w) standard normal in place of what the seeds give, for published protocols;
            noise of later steps still comes from the seeds.
        watch: gives what predicts in place of the model for the pictures from `start` on, `size` of them.
    Returns:
        (N, 3, H, W) float32 in [0, 1] on the CPU.
    Raises:
        UserError: a picture size that the autoencoder cannot make, or more steps than timesteps.
    Source: SoftREPA sample.py and sampler.py (spec h), without its min-max stretching of the saved picture.
    """
    parts = draw_latents(model, prompts, settings, seeds, callback, start_noise=start_noise, watch=watch)
    return torch.cat([model.decode(z).float().cpu() for z in parts])


@torch.no_grad()
def draw_latents(
    model: BaseModel,
    prompts: Sequence[str],
    settings: SampleSettings,
    seeds: Sequence[int],
    callback: Callback | None = None,
    *,
    start_noise: Tensor | None = None,
    watch: Callable[[int, int], Predict] | None = None,
) -> Iterator[Tensor]:
    """What `sample` decodes, batch by batch: (B, C, h, w) scaled latents on the model's device, float32."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if not prompts:
        raise ValueError("no prompts to draw")
    side = check_settings(model, settings)
    shape = (model.latent_channels, side // model.vae_factor, side // model.vae_factor)
    total = len(prompts) * settings.steps
    for start in range(0, len(prompts), settings.batch_size):
        part = list(prompts[start : start + settings.batch_size])
        noise = PictureNoise(seeds[start : start + settings.batch_size], shape, model)
        size, first = len(part), start * settings.steps
        from_step = None if settings.from_step < 0 else settings.from_step
        text = StepText(model, part, settings.steps, from_step=from_step)

        def report(step: int, size: int = size, first: int = first) -> None:
            if callback is not None:
                callback(first + (step + 1) * size, total)

        correct = Correction(model, part, seeds[start : start + settings.batch_size], settings)
        yield rollout(
            model.predict if watch is None else watch(start, size),
            model.process,
            noise() if start_noise is None else start_noise[start : start + size].to(model.device),
            steps=settings.steps,
            spacing=None if settings.sampler == "euler" else settings.spacing,
            sampler=settings.sampler,
            eta=settings.eta,
            guidance=settings.guidance,
            cond=text.cond,
            uncond=text.uncond if settings.guidance != 1 else None,
            grad_steps=frozenset(),
            noise_fn=noise,
            callback=report,
            end="before" if correct.at_work and settings.correction == "official" else "z",
            correct=correct if correct.at_work else None,
            correct_path=settings.correction == "latent",
        )


def check_settings(model: BaseModel, settings: SampleSettings) -> int:
    """Pixels of the picture's side. UserError for settings that this model cannot draw with."""
    side = settings.image_size or model.image_size
    check_side(model, side, "sample.image_size")
    settings.check_model(model.model_id, model.vae_factor, model.process.num_train_timesteps)
    allowed = samplers_of(model.process)
    if settings.sampler not in allowed:
        word = "is" if settings.sampler == "euler" else "is not"
        raise UserError(
            f"sample.sampler {settings.sampler} {word} for flow-matching models; {model.model_id} draws with "
            f"{', '.join(allowed)}"
        )
    return side


def check_side(model: BaseModel, side: int, what: str) -> None:
    """UserError, about the setting `what`, if the model makes no pictures of this side (pixels)."""
    most = model.max_image_size
    require_multiple(what, side, model.size_factor, model.model_id)
    if most and side > most:
        raise UserError(f"{what} must be at most {most} pixels for {model.model_id}, got {side}")


def own_settings(model: BaseModel, settings: SampleSettings, open_keys: Collection[str]) -> SampleSettings:
    """`settings` with the own choice of model and sampler of those among `open_keys`: sampler, spacing.

    open_keys: names of settings that nobody chose. A flow-matching model has no spacing to choose.
    """
    own: dict[str, str] = {}
    if "sampler" in open_keys:
        own["sampler"] = samplers_of(model.process)[0]
    if "spacing" in open_keys and model.process.prediction_type != "flow":
        sampler = own.get("sampler", settings.sampler)
        own["spacing"] = OWN_SPACING.get(sampler, model.process.timestep_spacing)
    return replace(settings, **own)  # type: ignore[arg-type]


def picture_seeds(seed: int, n: int) -> list[int]:
    """`n` start-noise seeds of an evaluation; those of different `seed` do not overlap (seed + i would)."""
    return [int(s) for s in np.random.SeedSequence([seed, 40]).generate_state(n, np.uint32)]


class Correction:
    """The shift of latents that DPT's self-correction asks for: scale times the gradient of the critics'
    scores. Raw: neither normalised nor weighted by the noise level.

    Source: generate_with_correction of txt2img.py.
    """

    def __init__(
        self, model: BaseModel, prompts: list[str], seeds: Sequence[int], settings: SampleSettings
    ) -> None:
        self.scale, self.literal = settings.self_correct, settings.correction == "official"
        self.at_work = bool(settings.self_correct and model.critics)
        groups = [[prompt] for prompt in prompts] if self.literal else [prompts]
        critics = model.critics if self.at_work else []
        self.judges = [[critic.judge(group) for critic in critics] for group in groups]
        self.seeds = [int(seed) for seed in seeds]

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """(B, C, h, w) of latents (B, C, h, w) at t ().

        Raises:
            UserError: the latents, or what is to be added to them, are no finite numbers.
        """
        found = self._found(z, t)
        if not (torch.isfinite(z).all() and torch.isfinite(found).all()):
            raise UserError(
                f"--self-correct {self.scale:g} drives the latents beyond all numbers at timestep {int(t)}; "
                "take a smaller scale"
            )
        return found

    def _found(self, z: Tensor, t: Tensor) -> Tensor:
        if not self.literal:
            return self._shift(z, t, 0, False)
        rows = []
        for place, seed in enumerate(self.seeds):  # dropout of a picture is drawn from its own seed
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed + int(t))
                rows.append(self._shift(z[place : place + 1], t, place, True))
        return torch.cat(rows)

    def _shift(self, z: Tensor, t: Tensor, group: int, dropout: bool) -> Tensor:
        slopes = [judge(z, t, dropout=dropout)[1] for judge in self.judges[group]]
        return self.scale * torch.stack(slopes).sum(0)


class PictureNoise:
    """Standard normal noise (B, C, h, w) float32, every picture from its own CPU generator."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], model: BaseModel) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, model.device

    def __call__(self) -> Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return noise.to(self.device)
