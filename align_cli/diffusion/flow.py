"""The straight path between data and noise of flow-matching models (SD3).

Letters: B batch, C H W latent, T number of training timesteps, sigma noise share in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNSUPPORTED = (
    "use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip
"""Keys of FlowMatchEulerDiscreteScheduler that change its path; SD3 and SD3.5 medium leave them off."""


@dataclass(frozen=True, kw_only=True)
class FlowProcess:
    """z_t = (1 - sigma) x0 + sigma eps with sigma = t / T, t in [0, T], int or float; the target is the
    velocity eps - x0.

    shift: sigma' -> shift sigma' / (1 + (shift - 1) sigma') on the sampling path; training is not shifted.
    Source: Esser et al., arXiv 2403.03206; SoftREPA train.py and sampler.py (spec d, h).
    """

    shift: float = 3.0
    num_train_timesteps: int = 1000
    prediction_type: str = "flow"
    timestep_spacing: str = "flow"

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.num_train_timesteps < 1:
            raise ValueError(
                f"shift must be > 0 and num_train_timesteps >= 1, got {self.shift}, "
                f"{self.num_train_timesteps}"
            )

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> FlowProcess:
        """Read a `scheduler_config.json` of diffusers as its FlowMatchEulerDiscreteScheduler would.

        Raises:
            ValueError: a path other than the shifted straight one (see `UNSUPPORTED`).
        """
        other = [key for key in UNSUPPORTED if config.get(key)]
        if other:
            raise ValueError(f"unsupported {other[0]} {config[other[0]]!r} of a flow-matching scheduler")
        return cls(
            shift=float(config.get("shift", 1.0)),
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        )

    def sigma(self, t: Tensor | float, like: Tensor) -> Tensor:
        """t / T on the device of `like`, shaped () or (B, 1, 1, 1), float32 (float64 for float64)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        sigma = torch.as_tensor(t, device=like.device, dtype=dtype) / self.num_train_timesteps
        return sigma.view(-1, *[1] * (like.ndim - 1)) if sigma.ndim else sigma

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """z_t of clean latents x0 (B, C, H, W) in their dtype; eps of the same or a broadcast shape; t () or
        (B,).
        """
        sigma = self.sigma(t, x0)
        return ((1 - sigma) * x0 + sigma * eps).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """What the model is trained to predict: the velocity eps - x0, the same for every t."""
        return (eps - x0).to(x0.dtype)

    def to_x0_eps(self, pred: Tensor, z_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Split a velocity (B, C, H, W) at z_t into (x0, eps) = (z - sigma v, z + (1 - sigma) v)."""
        sigma = self.sigma(t, z_t)
        return z_t - sigma * pred, z_t + (1 - sigma) * pred

    def timesteps(self, n: int, spacing: str | None = None) -> Tensor:
        """(n,) float32, descending from T, the bits of FlowMatchEulerDiscreteScheduler.set_timesteps(n).

        The scheduler takes n even steps between the first and the last sigma of its own, already shifted,
        table and shifts them once more. Below the last timestep comes sigma 0.
        Raises:
            ValueError: n outside [1, T]; a spacing (there is only this one).
        """
        if spacing not in (None, self.timestep_spacing):
            raise ValueError(f"a flow-matching model has one spacing of its own, not {spacing!r}")
        total = self.num_train_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"the number of sampling steps must be in [1, {total}], got {n}")
        # float32 here and float64 below, as there
        ends = torch.tensor([total, 1], dtype=torch.float32) / total
        first, last = (self.shift * ends / (1 + (self.shift - 1) * ends)).tolist()
        sigmas = np.linspace(first * total, last * total, n) / total
        sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        return torch.from_numpy(sigmas).to(torch.float32) * total
