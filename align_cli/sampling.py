"""Draw pictures with a base model, adapters attached or not.

Shape letters: N pictures, B of them in one forward pass, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from align_cli.diffusion.rollout import rollout
from align_cli.errors import UserError
from align_cli.models.base import BaseModel
from align_cli.pictures import Note, contact_sheet, save_png
from align_cli.settings import SampleSettings

__all__ = ["Note", "check_settings", "contact_sheet", "picture_seeds", "sample", "save_png"]

Callback = Callable[[int, int], None]
"""Called as (done, total), both in pictures times denoising steps."""


@torch.no_grad()
def sample(
    model: BaseModel,
    prompts: Sequence[str],
    settings: SampleSettings,
    seeds: Sequence[int],
    callback: Callback | None = None,
) -> Tensor:
    """One picture per prompt.

    Picture i depends on prompt i and seed i alone: all its noise comes from its own CPU generator, so neither
    the device, nor the batch size, nor its neighbours choose it. What remains are rounding errors that differ
    between batch sizes and hardware (float32 on one CPU: about 1e-6, seldom seen in a PNG).

    Args:
        prompts, seeds: N each.
        settings: sampler, number of steps, guidance, batch size; image_size 0 takes the model's own.
    Returns:
        (N, 3, H, W) float32 in [0, 1] on the CPU.
    Raises:
        UserError: a picture size that the autoencoder cannot make, or more steps than timesteps.
    Source: SoftREPA sample.py and sampler.py (spec h), without its min-max stretching of the saved picture.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if not prompts:
        raise ValueError("no prompts to draw")
    side = check_settings(model, settings)
    shape = (model.latent_channels, side // model.vae_factor, side // model.vae_factor)
    total = len(prompts) * settings.steps
    pictures: list[Tensor] = []
    for start in range(0, len(prompts), settings.batch_size):
        part = list(prompts[start : start + settings.batch_size])
        noise = PictureNoise(seeds[start : start + settings.batch_size], shape, model)
        size, first = len(part), start * settings.steps

        def report(step: int, size: int = size, first: int = first) -> None:
            if callback is not None:
                callback(first + (step + 1) * size, total)

        z = rollout(
            model.predict,
            model.process,
            noise(),
            steps=settings.steps,
            spacing=settings.spacing,
            sampler=settings.sampler,
            eta=settings.eta,
            guidance=settings.guidance,
            cond=model.encode_text(part),
            uncond=model.uncond(size) if settings.guidance != 1 else None,
            grad_steps=frozenset(),
            noise_fn=noise,
            callback=report,
        )
        pictures.append(model.decode(z).float().cpu())
    return torch.cat(pictures)


def check_settings(model: BaseModel, settings: SampleSettings) -> int:
    """Pixels of the picture's side. UserError for settings that this model cannot draw with."""
    side = settings.image_size or model.image_size
    if side % model.vae_factor:
        near = max(1, round(side / model.vae_factor)) * model.vae_factor
        raise UserError(
            f"sample.image_size must be a multiple of {model.vae_factor} pixels for {model.model_id}, "
            f"got {side}; try {near}"
        )
    if settings.steps > model.process.num_train_timesteps:
        raise UserError(
            f"sample.steps must be at most {model.process.num_train_timesteps}, got {settings.steps}"
        )
    return side


def picture_seeds(seed: int, n: int) -> list[int]:
    """`n` start-noise seeds of an evaluation; those of different `seed` do not overlap (seed + i would)."""
    return [int(s) for s in np.random.SeedSequence([seed, 40]).generate_state(n, np.uint32)]


class PictureNoise:
    """Standard normal noise (B, C, h, w) float32, every picture from its own CPU generator."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], model: BaseModel) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, model.device

    def __call__(self) -> Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return noise.to(self.device)
