"""One denoising step, tensors in and out: DDIM, DDPM, LCM, Euler. Nothing is detached and nothing is clipped.

Letters: B batch, C H W latent. `t`, `t_prev`: integer indices; `t_prev` below 0 is the end of the path. Of a
flow they are floats in [0, T], and 0 is the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess, Process


def samplers_of(process: Process) -> tuple[str, ...]:
    """The samplers that work on a process, its own first."""
    return ("euler",) if isinstance(process, FlowProcess) else ("ddim", "ddpm", "lcm", "unipc")


def ddim_step(
    process: NoiseProcess,
    pred: Tensor,
    z: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From z_t to z_{t_prev}.

        x0, eps from pred;  sigma^2 = eta^2 (1 - abar_prev) / (1 - abar_t) (1 - abar_t / abar_prev)
        z_prev = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma noise

    Args:
        pred, z: (B, C, H, W). t, t_prev: int, () or (B,). noise: standard normal like z, needed if eta > 0.
    Returns:
        (B, C, H, W), differentiable in pred and z.
    Source: DDIM, arXiv 2010.02502, eqs. 12 and 16; diffusers DDIMScheduler.step with clip_sample False.
    Below t = 0 abar is the process's final_alpha_cumprod (abar_0 for SD1.x, not 1).
    """
    x0, eps = process.to_x0_eps(pred, z, t)
    abar, before = process.abar(t, z), process.abar(t_prev, z)
    if eta == 0:
        return before.sqrt() * x0 + (1 - before).sqrt() * eps
    if noise is None:
        raise ValueError("eta > 0 needs noise")
    sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
    return before.sqrt() * x0 + (1 - before - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise


def ddpm_step(
    process: NoiseProcess,
    pred: Tensor,
    z: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """From z_t to z_{t_prev}: the posterior mean plus noise of variance "fixed_small".

        alpha = abar_t / abar_prev;  beta = 1 - alpha
        mean = sqrt(abar_prev) beta / (1 - abar_t) x0 + sqrt(alpha) (1 - abar_prev) / (1 - abar_t) z
        variance = (1 - abar_prev) / (1 - abar_t) beta

    Args:
        pred, z: (B, C, H, W). t, t_prev: int, () or (B,). noise: standard normal like z, needed where t_prev
        >= 0.
    Source: DDPM, arXiv 2006.11239, eqs. 6 and 7; diffusers DDPMScheduler.step with clip_sample False. Below t
    = 0
    abar is 1, whatever final_alpha_cumprod is, as in diffusers: the last step returns x0.
    """
    x0, _ = process.to_x0_eps(pred, z, t)
    abar, before = process.abar(t, z), process.abar(t_prev, z, final=1.0)
    alpha = abar / before
    beta = 1 - alpha
    mean = before.sqrt() * beta / (1 - abar) * x0 + alpha.sqrt() * (1 - before) / (1 - abar) * z
    if isinstance(t_prev, int) and t_prev < 0:
        return mean
    if noise is None:
        raise ValueError("a DDPM step that is not the last one needs noise")
    variance = (1 - before) / (1 - abar) * beta
    return mean + torch.where(before < 1, variance, torch.zeros_like(variance)).sqrt() * noise


def lcm_step(
    process: NoiseProcess,
    pred: Tensor,
    z: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """From z_t to z_{t_prev}: the prediction of the clean latent, noised again.

        x0 from pred;  z_prev = sqrt(abar_prev) x0 + sqrt(1 - abar_prev) noise

    Args:
        pred, z: (B, C, H, W). t, t_prev: int, () or (B,). noise: standard normal like z, needed where t_prev
        >= 0.
    Returns:
        (B, C, H, W), differentiable in pred and z. Below t = 0 abar is 1: the last step returns x0.
    Source: LCM, arXiv 2310.04378, algorithm 3; LongAlign unet_reward_lcm.py and sample.py, which is
    diffusers' LCMScheduler.step with boundary scalings c_skip 0 and c_out 1 and without clipping.
    """
    x0, _ = process.to_x0_eps(pred, z, t)
    if isinstance(t_prev, int) and t_prev < 0:
        return x0
    if noise is None:
        raise ValueError("an LCM step that is not the last one needs noise")
    before = process.abar(t_prev, z, final=1.0)
    return before.sqrt() * x0 + (1 - before).sqrt() * noise


def euler_step(
    process: FlowProcess, pred: Tensor, z: Tensor, t: float | Tensor, t_prev: float | Tensor
) -> Tensor:
    """From z_t to z_{t_prev} along the velocity: z + (sigma_prev - sigma) pred.

    Args:
        pred, z: (B, C, H, W). t, t_prev: float, () or (B,), in [0, T].
    Source: diffusers FlowMatchEulerDiscreteScheduler.step; SoftREPA sampler.py.
    """
    return z + (process.sigma(t_prev, z) - process.sigma(t, z)) * pred
