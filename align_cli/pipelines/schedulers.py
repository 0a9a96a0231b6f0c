"""The scheduler of diffusers that walks the path of our own sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from align_cli.diffusion.process import SPACINGS, NoiseProcess, Process
from align_cli.settings import SampleSettings

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "lcm": LCMScheduler,
    "unipc": UniPCMultistepScheduler,
}
"""Sampler of models that predict noise -> class of diffusers."""


def scheduler_for(process: Process, config: Mapping[str, Any], settings: SampleSettings) -> Any:
    """A scheduler with the timesteps and the steps of `settings.sampler`.

    Args:
        config: scheduler_config.json of the model, from which `process` was read. settings: for this model.
    """
    if settings.sampler == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    process = cast("NoiseProcess", process)
    spacing, cls = settings.spacing, SCHEDULERS[settings.sampler]
    # absent keys take DDIM's defaults, as in NoiseProcess.from_scheduler_config
    facts = {
        "num_train_timesteps": process.num_train_timesteps,
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "beta_schedule": config.get("beta_schedule", "linear"),
        "trained_betas": config.get("trained_betas"),
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr")),
        "set_alpha_to_one": bool(config.get("set_alpha_to_one", True)),
        "prediction_type": process.prediction_type,
        "steps_offset": process.steps_offset,
        "timestep_spacing": spacing if spacing in SPACINGS else "leading",
        "clip_sample": False,
        "timestep_scaling": 1e5,  # of LCM: the noisy latent has no share, as in `lcm_step`
    }
    if (spacing in SPACINGS and settings.sampler != "lcm") or spacing == settings.sampler:
        own = cls
    else:
        # by the name of the stock class, which is what opens a pipeline that is saved with it
        own = type(cls.__name__, (_OwnPath, cls), {"__module__": cls.__module__})
    known = signature(cls.__init__).parameters
    scheduler = own(**{key: value for key, value in facts.items() if key in known})
    if own is not cls:
        scheduler.path = lambda n: process.timesteps(n, spacing)
    return scheduler


class _OwnPath:
    """In place of a scheduler's own timesteps those of a spacing that it does not know."""

    path: Callable[[int], Tensor]

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        """See diffusers' schedulers."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.path(num_inference_steps).to(device or torch.device("cpu"))
        self.custom_timesteps = False
        self._step_index = self._begin_index = None

    def get_scalings_for_boundary_condition_discrete(self, timestep: int) -> tuple[float, float]:
        """Of LCM: shares of the noisy latent and of the prediction, at t = 0, too."""
        return 0.0, 1.0
