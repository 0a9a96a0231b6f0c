"""The denoising path from noise to a clean latent: for sampling, and with gradient for reward training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.guidance import Cond, guided
from align_cli.diffusion.process import NoiseProcess, Process
from align_cli.diffusion.samplers import ddim_step, ddpm_step, euler_step, lcm_step, samplers_of
from align_cli.diffusion.unipc import UniPC, unipc_timesteps

Given = TypeVar("Given")


def rollout(
    predict: Callable[[Tensor, Tensor, Cond], Tensor],
    process: Process,
    z: Tensor,
    *,
    steps: int,
    cond: Cond | Callable[[int], Cond],
    uncond: Cond | Callable[[int], Cond] | None = None,
    guidance: float = 1.0,
    spacing: str | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    grad_steps: frozenset[int] | None = None,
    detach_input: bool = False,
    checkpoint: bool | frozenset[int] = False,
    noise_fn: Callable[[], Tensor] | None = None,
    callback: Callable[[int], None] | None = None,
    end: str = "z",
    correct: Callable[[Tensor, Tensor], Tensor] | None = None,
    correct_path: bool = False,
) -> Tensor:
    """Denoise z along `steps` timesteps.

    Args:
        predict: predict(z (B, C, H, W), t (), cond) -> eps or velocity, as `process` says. t is int64, for a
        flow float32.
        z: (B, C, H, W) standard normal noise. It is held in float32 (or float64) between steps.
        cond, uncond: conditioning of B rows each, or a function of the step's index that gives it; uncond is
        needed unless guidance is 1.
        spacing: leading, trailing, linspace, lead or lcm; None takes the process's own, and a flow has no
        other. unipc reads it as `unipc_timesteps` says.
        sampler: "ddim" (with eta), "ddpm", "lcm" or "unipc"; "euler" for a flow, which has no other. None:
        ddim or euler.
        grad_steps: indices (0 is the noisiest) of the steps whose prediction carries gradient; the others run
        under `torch.no_grad`. None: all. The step arithmetic itself is never detached, so gradient passes
            through the steps between two gradient steps by their linear part (DRaFT, TextCraftor, CoMat do
            the same).
        detach_input: cut the model's input from the path in every step: gradient reaches earlier predictions
        only through the step arithmetic (CoMat's official SDXL loop).
        checkpoint: recompute the activations of gradient steps, all or those named, in the backward pass.
        noise_fn: standard normal noise like z, once per step that needs it (ddpm and lcm in all but the last
        one; ddim if eta > 0).
        callback: called with the index of each finished step.
        end: "z", where the last step of the sampler leads; or "x0", what its prediction says of the clean
        latent, as LongAlign decodes it (they differ for ddim, which ends at final_alpha_cumprod); or
        "before", where the last step begins, as DPT's self-correction decodes it.
        correct: shift (B, C, H, W) of the latent at t (), asked for in every step: of what the prompt's
        branch of the guidance sees (DPT's official code), or with correct_path of the latent itself, which
        the step then starts from (DPT's figure).
    Returns:
        (B, C, H, W) the clean latent.
    Where DDIM steps to: t - T // steps, also for linspace, where that is not the next listed timestep. All
    others step to the next listed timestep. As in diffusers, and so in the official code of all five methods.
    """
    if end not in ("z", "x0", "before"):
        raise ValueError(f"a path ends in z, x0 or before, not {end!r}")
    allowed = samplers_of(process)
    sampler = sampler or allowed[0]
    if sampler not in allowed:
        raise ValueError(
            f"no sampler {sampler!r} for prediction type {process.prediction_type}: {', '.join(allowed)}"
        )
    stray = [i for i in grad_steps or () if not 0 <= i < steps]
    if stray:
        raise ValueError(f"grad_steps must be in [0, {steps}), got {stray}")
    model = guided(predict, guidance)
    solver: UniPC | None = None
    if sampler == "unipc":
        path = unipc_timesteps(cast("NoiseProcess", process), steps, spacing)
        solver = UniPC(cast("NoiseProcess", process), path)
    else:
        path = process.timesteps(steps, spacing)
    stride = process.num_train_timesteps // steps
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for i, t in enumerate(path.tolist()):
        if i + 1 == steps and end == "before":
            if callback is not None:
                callback(i)
            break
        shift = None if correct is None else correct(z, torch.tensor(t, device=z.device)).to(z.dtype)
        if correct_path and shift is not None:
            z, shift = z + shift, None
        # the prediction is taken as float32 below: fp16 latents would lose more at every step
        now = z.detach() if detach_input else z
        inputs = (now, torch.tensor(t, device=z.device), at_step(cond, i), at_step(uncond, i), shift)
        if grad_steps is not None and i not in grad_steps:
            with torch.no_grad(), _uncached(z.device.type):
                pred = model(*inputs)
        elif torch.is_grad_enabled() and (checkpoint is True or (checkpoint and i in checkpoint)):
            pred = recompute(model, *inputs, use_reentrant=False)
        else:
            pred = model(*inputs)
        pred = pred.to(z.dtype)
        after = path[i + 1].item() if i + 1 < steps else None
        if after is None and end == "x0":
            z, _ = process.to_x0_eps(pred, z, t)
        elif isinstance(process, FlowProcess):
            z = euler_step(process, pred, z, t, after or 0.0)
        elif solver is not None:
            z = solver.step(pred, z, i)
        elif sampler == "ddim":
            noise = _draw(noise_fn, z) if eta > 0 else None
            z = ddim_step(cast("NoiseProcess", process), pred, z, t, t - stride, eta, noise)
        else:
            noise = None if after is None else _draw(noise_fn, z)
            before = -1 if after is None else int(after)
            renoise = ddpm_step if sampler == "ddpm" else lcm_step
            z = renoise(cast("NoiseProcess", process), pred, z, t, before, noise)
        if callback is not None:
            callback(i)
    return z


def _uncached(device_type: str) -> torch.autocast:
    """Autocast as it is, but without its memory of cast weights: with torch of 2025 and before, a weight that
    was cast where there is no gradient has none in the steps that follow, either.
    Source: github.com/pytorch/pytorch, issues 65766 and 158232.
    """
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def at_step(given: Given | Callable[[int], Given], i: int) -> Given:
    """`given`, or what it says of step i if it is a function."""
    return given(i) if callable(given) else given


def _draw(noise_fn: Callable[[], Tensor] | None, like: Tensor) -> Tensor:
    if noise_fn is None:
        raise ValueError("this sampler needs noise_fn")
    return noise_fn().to(like.device, like.dtype)
