"""FlowEdit: change a picture from what one prompt says to what another says, without inverting it.

Source and target are denoised side by side from the same noise, and the difference of their velocities moves
the picture. Source: Kulikov et al., FlowEdit, arXiv 2412.08629; SoftREPA edit_sd3.py and sampler.py (class
SD3EulerFE).

Rectified form of epsilon and v models. FlowEdit needs a velocity on a straight path from data to noise. A
model with z = a x0 + s eps, a = sqrt(abar), s = sqrt(1 - abar), has one after a change of scale:

    z_rf = z / (a + s) = (1 - sigma) x0 + sigma eps,    sigma = s / (a + s)

Its probability-flow equation is d(z / a) / d(s / a) = eps(z) (DDIM, arXiv 2010.02502, eq. 14). With
z / a = z_rf / (1 - sigma) and s / a = sigma / (1 - sigma), whose derivative is 1 / (1 - sigma)^2,

    d z_rf / d sigma = -z_rf / (1 - sigma) + eps / (1 - sigma) = eps - x0,    x0 = (z - s eps) / a

so eps - x0, both as the model predicts them at z, is exactly the velocity of a flow-matching model. It is
affine in the prediction, so guidance of velocities is guidance of predictions.

Letters: B edits at once, C h w latent, H W pixels, R rows of a denoiser call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from align_cli.diffusion.process import NoiseProcess, Process
from align_cli.diffusion.rollout import at_step
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, TextCond
from align_cli.models.conditioning import StepText
from align_cli.pictures import to_uint8
from align_cli.sampling import PictureNoise
from align_cli.settings import EditSettings

CONVENTIONS = ("softrepa", "flowedit")
CALLS = 4
"""Denoiser rows of one edit: source and target, each without and with its prompt."""

StepCond = TextCond | Callable[[int], TextCond]
"""Conditioning of all steps, or a function of the step's index."""
Callback = Callable[[int, int], None]
"""Called as (done, total), in steps times edits."""


class Predictor(Protocol):
    """The part of `BaseModel` that `flowedit` needs."""

    process: Process

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        """eps, v or velocity, as `process` says."""
        ...


def rectified(process: Process, t: Tensor) -> tuple[float, float]:
    """(sigma, scale) of timestep t (): the model's z_t is scale * ((1 - sigma) x0 + sigma eps).

    Flow models: (t / T, 1). Others: (s / (a + s), a + s) with a = sqrt(abar_t), s = sqrt(1 - abar_t).
    """
    if not isinstance(process, NoiseProcess):
        return float(t) / process.num_train_timesteps, 1.0
    abar = float(process.alphas_cumprod[int(t)])
    a, s = abar**0.5, (1 - abar) ** 0.5
    return s / (a + s), a + s


def velocity(model: Predictor, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
    """d z / d sigma at rectified latents z (R, C, h, w) and timestep t (), float32: eps - x0 as predicted.

    cond: R rows. A flow model's own prediction is returned as it is.
    """
    scale = rectified(model.process, t)[1]
    if model.process.prediction_type == "flow":
        return model.predict(z, t, cond).to(z.dtype)
    scaled = z * scale
    x0, eps = model.process.to_x0_eps(model.predict(scaled, t, cond).to(z.dtype), scaled, t)
    return eps - x0


@torch.no_grad()
def flowedit(
    model: Predictor,
    source: Tensor,
    src: StepCond,
    tgt: StepCond,
    uncond: StepCond,
    *,
    steps: int,
    n_start: int,
    src_guidance: float,
    tgt_guidance: float,
    convention: str = "softrepa",
    n_min: int = 0,
    n_avg: int = 1,
    batch_size: int = 0,
    noise_fn: Callable[[], Tensor],
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Edit latents. Of the `steps` timesteps of the model's own path only the last n_start are run:

        a = (1 - sigma) x + sigma eps,   b = a + (z - x)          x the source, z the edit, z = x at first
        V_src = u(a) + s_src (v(a, src) - u(a))                    u: velocity without prompt
        V_tgt = v(b, tgt) + s_tgt (v(b, tgt) - u(b))               convention "softrepa", the official code
        V_tgt = u(b) + s_tgt (v(b, tgt) - u(b))                    convention "flowedit"
        z <- z + (sigma_next - sigma) (V_tgt - V_src)              mean over n_avg noises

    The last n_min of them are FlowEdit's second phase: z is noised once like the source, z <- b, and then
    follows V_tgt alone. With n_min == n_start this is SDEdit from the source.

    Args:
        source: (B, C, h, w) scaled latents. src, tgt, uncond: B rows each, or a function that gives them for
        the index of a step of the whole path.
        n_start: in [0, steps]; 0 returns the source. n_min: in [0, n_start].
        batch_size: most rows of one denoiser call; 0 makes all calls of a step at once.
        noise_fn: standard normal noise like source; called n_avg times in a step of the first phase, and once
            where the second begins.
        callback: called with the number of finished steps.
    Returns:
        (B, C, h, w) float32 (float64 for a float64 source). With n_min 0, equal prompts and guidance, and
        convention flowedit, it is the source again.
    Raises:
        ValueError: an impossible number of steps, or an unknown convention.
    Source: spec i; FlowEdit's FlowEdit_utils.py for n_min and n_avg. b is computed as a + (z - x), not
    z + a - x, so that it is exactly a where z is x.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be {' or '.join(CONVENTIONS)}, got {convention!r}")
    if not 0 <= n_min <= n_start <= steps or n_avg < 1:
        raise ValueError(
            f"0 <= n_min <= n_start <= steps and n_avg >= 1 must hold, got {n_min}, {n_start}, {steps}, "
            f"{n_avg}"
        )
    x = source.to(torch.promote_types(source.dtype, torch.float32))
    if n_start == 0:
        return x
    # both conventions as u + s (v - u)
    scale = tgt_guidance + 1 if convention == "softrepa" else tgt_guidance

    def guided(i: int, sides: Sequence[tuple[Tensor, StepCond, float]]) -> list[Tensor]:
        """Velocities at step i of several (latents, prompt, scale), all in one batch of calls."""
        t, empty = path[i], at_step(uncond, i)
        rows: list[tuple[Tensor, TextCond]] = []
        for latents, prompt, s in sides:
            cond = at_step(prompt, i)
            rows += [(latents, cond)] if s == 1 else [(latents, empty), (latents, cond)]
        v = iter(_calls(model, torch.cat([z for z, _ in rows]), t, rows, batch_size).chunk(len(rows)))
        out = []
        for _, _, s in sides:
            first = next(v)
            out.append(first if s == 1 else first + s * (next(v) - first))
        return out

    path = model.process.timesteps(steps).to(x.device)
    sigmas = [rectified(model.process, t)[0] for t in path] + [0.0]
    z = x
    for done, i in enumerate(range(steps - n_start, steps)):
        sigma, width = sigmas[i], sigmas[i + 1] - sigmas[i]
        if steps - i > n_min:
            move = torch.zeros_like(z)
            for _ in range(n_avg):
                a = (1 - sigma) * x + sigma * noise_fn().to(x)
                v_src, v_tgt = guided(i, [(a, src, src_guidance), (a + (z - x), tgt, scale)])
                move = move + (v_tgt - v_src) / n_avg
            z = z + width * move
        else:
            if steps - i == n_min:
                z = z + sigma * (noise_fn().to(x) - x)
            z = z + width * guided(i, [(z, tgt, scale)])[0]
        if callback is not None:
            callback(done + 1)
    return z


def _calls(
    model: Predictor, z: Tensor, t: Tensor, parts: Sequence[tuple[Tensor, TextCond]], batch_size: int
) -> Tensor:
    """Velocities of all rows of z, at most `batch_size` of them in one call."""
    cond = TextCond.cat([c for _, c in parts])
    size = batch_size or len(z)
    pieces = [slice(k, k + size) for k in range(0, len(z), size)]
    return torch.cat([velocity(model, z[piece], t, cond[piece]) for piece in pieces])


@torch.no_grad()
def edit(
    model: BaseModel,
    pictures: np.ndarray,
    src_prompts: Sequence[str],
    tgt_prompts: Sequence[str],
    settings: EditSettings,
    seeds: Sequence[int],
    callback: Callback | None = None,
) -> np.ndarray:
    """Edit pictures of one size, `edits_at_once` of them at a time.

    Edit i depends on picture i, its two prompts and seed i alone: the draw from the autoencoder's posterior
    and then all noises come from its own CPU generator.

    Args:
        pictures: (N, H, W, 3) uint8, of a size that `check_size` lets pass.
        src_prompts, tgt_prompts, seeds: N each.
    Returns:
        (N, H, W, 3) uint8.
    Raises:
        UserError: a size that the model cannot make, more steps than it has timesteps, or a result that is
            not finite.
    """
    if not len(pictures) == len(src_prompts) == len(tgt_prompts) == len(seeds):
        raise ValueError("pictures, prompts and seeds must be as many")
    check_size(model, pictures.shape[2], pictures.shape[1])
    check_steps(model, settings)
    at_once = edits_at_once(settings)
    total = len(pictures) * settings.n_start
    out: list[np.ndarray] = []
    for start in range(0, len(pictures), at_once):
        rows = slice(start, min(start + at_once, len(pictures)))
        size, first = rows.stop - start, start * settings.n_start

        def report(step: int, size: int = size, first: int = first) -> None:
            if callback is not None:
                callback(first + step * size, total)

        pixels = torch.from_numpy(np.ascontiguousarray(pictures[rows])).permute(0, 3, 1, 2).float()
        factor = model.vae_factor
        shape = (model.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
        noise = PictureNoise(seeds[rows], shape, model)
        source = model.encode_image((pixels / 127.5 - 1).to(model.device), noise())
        target = StepText(model, tgt_prompts[rows], settings.steps)
        z = flowedit(
            model,
            source,
            StepText(model, src_prompts[rows], settings.steps).cond,
            target.cond,
            target.uncond,
            steps=settings.steps,
            n_start=settings.n_start,
            src_guidance=settings.src_guidance,
            tgt_guidance=settings.tgt_guidance,
            convention=settings.convention,
            n_min=settings.n_min,
            n_avg=settings.n_avg,
            batch_size=settings.batch_size,
            noise_fn=noise,
            callback=report,
        )
        edited = model.decode(z)
        if not torch.isfinite(edited).all():
            raise UserError(
                f"{model.model_id} gave numbers that are not finite in {model.dtype}; take --dtype bfloat16 "
                f"or float32, or less guidance"
            )
        out.append(to_uint8(edited))
    return np.concatenate(out)


def edits_at_once(settings: EditSettings) -> int:
    """How many edits share a denoiser call."""
    return max(1, settings.batch_size // CALLS)


def check_size(model: BaseModel, width: int, height: int) -> None:
    """UserError for a picture (pixels) that the model cannot encode and denoise."""
    factor, most = model.size_factor, model.max_image_size
    if width % factor or height % factor:
        near = [max(1, round(side / factor)) * factor for side in (width, height)]
        raise UserError(
            f"{model.model_id} edits pictures whose sides are multiples of {factor} pixels, got {width} x "
            f"{height} (near: {near[0]} x {near[1]}); resize with --image-size N or --keep-aspect"
        )
    if most and max(width, height) > most:
        raise UserError(
            f"{model.model_id} knows positions up to {most} pixels, got {width} x {height}; resize with "
            f"--image-size N"
        )


def check_steps(model: BaseModel, settings: EditSettings) -> None:
    """UserError for more steps than the model has timesteps."""
    if settings.steps > model.process.num_train_timesteps:
        raise UserError(
            f"edit.steps must be at most {model.process.num_train_timesteps}, got {settings.steps}"
        )
