"""The forward noise process of epsilon and velocity models, built from a diffusers scheduler configuration.

Letters: B batch, C H W latent, T number of training timesteps, abar cumulative product of (1 - beta).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("leading", "trailing", "linspace")
"""Of diffusers' DDIM; `NoiseProcess.timesteps` also knows lead, which is TextCraftor's, and lcm."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
LCM_STEPS = 50
"""Steps of the path on which consistency models are distilled; spacing lcm takes its timesteps from there.
Source: original_inference_steps of diffusers' LCMScheduler."""


class Process(Protocol):
    """What noises a family's latents: `NoiseProcess` here, or `FlowProcess` of flow.py.

    t: an int or float, or a tensor () or (B,); integer indices in [0, T) for `NoiseProcess`.
    """

    @property
    def prediction_type(self) -> str:
        """What the model predicts: epsilon, v_prediction, sample (the clean latent) or flow."""
        ...

    @property
    def timestep_spacing(self) -> str:
        """The model's own spacing of `timesteps`."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, t: Any) -> Tensor:
        """z_t of clean latents x0 (B, C, H, W) and noise of the same or a broadcast shape."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t: Any) -> Tensor:
        """What the model is trained to predict at z_t, (B, C, H, W)."""
        ...

    def to_x0_eps(self, pred: Tensor, z_t: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        """Split a prediction (B, C, H, W) at z_t into (x0, eps)."""
        ...

    def timesteps(self, n: int, spacing: str | None = None) -> Tensor:
        """(n,) timesteps of a sampling path, descending; spacing None takes the model's own."""
        ...


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """z_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t an integer index in [0, T).

    alphas_cumprod: (T,) float32, the same bits as in diffusers. final_alpha_cumprod: abar used below t = 0.
    prediction_type: epsilon, v_prediction or sample (x0). timestep_spacing, steps_offset: how `timesteps`
    chooses indices (diffusers' names and meanings).
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseProcess:
        """Read a `scheduler_config.json` of diffusers as its `DDIMScheduler.from_config` would.

        DDIM, PNDM, Euler and DDPM files share the noise schedule. Absent keys take DDIM's defaults.
        `clip_sample`
        is ignored: x0 is never clipped, since latents are not pixels.
        Raises:
            ValueError: a schedule or target that is none of those of SD1.x and SD2.x, or epsilon prediction
            at zero terminal SNR (the last timestep would hold no signal to predict from).
        """
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr") or False:
            betas = _zero_terminal_snr(betas)
        abar = torch.cumprod(1 - betas, 0)
        prediction = str(config.get("prediction_type", "epsilon"))
        if prediction not in PREDICTION_TYPES:
            raise ValueError(f"unsupported prediction_type {prediction!r}: {', '.join(PREDICTION_TYPES)}")
        if prediction == "epsilon" and float(abar[-1]) == 0:
            raise ValueError("rescale_betas_zero_snr needs prediction_type v_prediction, not epsilon")
        spacing = str(config.get("timestep_spacing", "leading"))
        if spacing not in SPACINGS:
            raise ValueError(f"unsupported timestep_spacing {spacing!r}: {', '.join(SPACINGS)}")
        final = 1.0 if config.get("set_alpha_to_one", True) else float(abar[0])
        return cls(abar, final, prediction, spacing, int(config.get("steps_offset", 0)))

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def abar(self, t: Tensor | int, like: Tensor, *, final: float | None = None) -> Tensor:
        """abar_t on the device of `like`, shaped () or (B, 1, 1, 1); `final` (default final_alpha_cumprod)
        below 0.
        """
        table = self.alphas_cumprod.to(like.device)
        last = self.final_alpha_cumprod if final is None else final
        if isinstance(t, int):
            return table[t] if t >= 0 else table.new_tensor(last)
        t = t.to(like.device)
        abar = torch.where(t >= 0, table[t.clamp(min=0)], last)
        return abar.view(-1, *[1] * (like.ndim - 1)) if abar.ndim else abar

    def coefficients(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t), sqrt(1 - abar_t), shaped () or (B, 1, 1, 1), float32 (float64 for a float64
        `like`).
        """
        abar = self.abar(t, like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """z_t of clean latents x0 (B, C, H, W) in their dtype; eps of the same or a broadcast shape; t () or
        (B,).
        """
        a, s = self.coefficients(t, x0)
        return (a * x0 + s * eps).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """What the model is trained to predict: eps, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0, or x0."""
        if self.prediction_type == "epsilon":
            return eps.expand_as(x0)
        if self.prediction_type == "sample":
            return x0
        a, s = self.coefficients(t, x0)
        return (a * eps - s * x0).to(x0.dtype)

    def to_x0_eps(self, pred: Tensor, z_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Split a prediction (B, C, H, W) at z_t into (x0, eps). Finite at zero terminal SNR too (not for
        epsilon).
        """
        a, s = self.coefficients(t, z_t)
        if self.prediction_type == "epsilon":
            return (z_t - s * pred) / a, pred
        if self.prediction_type == "sample":
            return pred, (z_t - a * pred) / s
        return a * z_t - s * pred, a * pred + s * z_t

    def timesteps(self, n: int, spacing: str | None = None) -> Tensor:
        """(n,) int64, descending, exactly as diffusers' DDIM spaces them; spacing None takes the model's own.

        leading: (T // n) i + steps_offset. trailing: from T - 1 down in steps of T / n, rounded. linspace:
        from T - 1 to 0, both included. lead: from T - 1 down in whole steps of T // n, 1 in place of what is
        not above 0; trailing where n divides T. Source: set_timesteps of TextCraftor's DDIM, lead 999.
        lcm: n of the LCM_STEPS trailing ones in steps of T // LCM_STEPS, evenly apart by their number from
        the noisiest on, rounded down. Source: set_timesteps of diffusers' LCMScheduler.
        Raises:
            ValueError: n outside [1, T] (lcm: [1, LCM_STEPS]), or so large that the offset leads beyond
            T - 1.
        """
        spacing, total = spacing or self.timestep_spacing, self.num_train_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"the number of sampling steps must be in [1, {total}], got {n}")
        if spacing == "leading":
            steps: Any = np.arange(n)[::-1] * (total // n) + self.steps_offset
            if steps[0] >= total:
                raise ValueError(
                    f"{n} steps with leading spacing and offset {self.steps_offset} exceed {total - 1}"
                )
        elif spacing == "trailing":
            # the grid of floats may hold one more point than n by rounding
            steps = (np.round(np.arange(total, 0, -total / n)) - 1)[:n]
        elif spacing == "lead":
            steps = np.maximum(total - 1 - np.arange(n) * (total // n), 1)
        elif spacing == "lcm":
            if n > LCM_STEPS or total < LCM_STEPS:
                raise ValueError(f"lcm spacing chooses among {LCM_STEPS} of at least as many timesteps, "
                                 f"not {n} of {total}")  # fmt: skip
            origin = np.arange(LCM_STEPS, 0, -1) * (total // LCM_STEPS) - 1
            steps = origin[np.floor(np.linspace(0, LCM_STEPS, n, endpoint=False)).astype(np.int64)]
        elif spacing == "linspace":
            steps = np.round(np.linspace(0, total - 1, n))[::-1]
        else:
            raise ValueError(f"unknown spacing {spacing!r}: {', '.join((*SPACINGS, 'lead', 'lcm'))}")
        return torch.from_numpy(np.ascontiguousarray(steps).astype(np.int64))


def _betas(config: Mapping[str, Any]) -> Tensor:
    """(T,) float32, computed as diffusers does."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    num = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float32)
    raise ValueError(f"unsupported beta_schedule {kind!r}: linear or scaled_linear")


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas so that the last abar is 0. Source: Lin et al. 2023, algorithm 1, arXiv 2305.08891."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
