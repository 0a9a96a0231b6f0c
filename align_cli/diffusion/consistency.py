"""Consistency functions of latent models: what is trained to say the same everywhere along a path.

Letters: B batch, C H W latent. `t`: integer indices.
"""

from __future__ import annotations

from torch import Tensor

from align_cli.diffusion.process import Process

SIGMA_DATA, TIMESTEP_FACTOR = 0.5, 10.0
"""Source: LongAlign tools.py; diffusers' LCMScheduler has the same."""


def c_skip(t: Tensor) -> Tensor:
    """Share of z_t itself in the consistency function: 0.25 / ((10 t)^2 + 0.25), 1 at t = 0.

    Args:
        t: indices of any shape.
    Returns:
        float32 of that shape.
    Source: LCM, arXiv 2310.04378, appendix; LongAlign tools.py, scalings_for_boundary_conditions.
    """
    return SIGMA_DATA**2 / ((TIMESTEP_FACTOR * t.float()) ** 2 + SIGMA_DATA**2)


def c_out(t: Tensor) -> Tensor:
    """Share of the predicted clean latent: 10 t / sqrt((10 t)^2 + 0.25), 0 at t = 0. As `c_skip`."""
    scaled = TIMESTEP_FACTOR * t.float()
    return scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5


def consistency(process: Process, pred: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """f(z_t, t) = c_skip(t) z_t + c_out(t) x0: the same clean latent for all t of a path, once trained.

    Args:
        pred, z_t: (B, C, H, W), the prediction at z_t and z_t. t: () or (B,).
    Returns:
        (B, C, H, W), float32 (float64 for float64), differentiable in pred and z_t; z_t itself at t = 0.
    Source: LongAlign unet_lcm.py, where x0 is not clamped either.
    """
    x0, _ = process.to_x0_eps(pred, z_t, t)
    skip, out = (c(t.to(z_t.device)).view(-1, *[1] * (z_t.ndim - 1)) for c in (c_skip, c_out))
    return skip * z_t + out * x0
