"""Train the autoencoder of the tiny pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from align_cli.shapes.build import components
from align_cli.shapes.build.run import Stage, line
from align_cli.shapes.captions import recaption
from align_cli.shapes.oracle import judge
from align_cli.shapes.world import render, sample_scenes

BATCH = 32
LR = 2e-3
KL_WEIGHT = 2e-3


def pictures(n: int, rng: np.random.Generator) -> Tensor:
    """(n, 3, 32, 32) float32 in [-1, 1]."""
    scenes = sample_scenes(n, rng, weights=(0.15, 0.35, 0.25, 0.25))
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss(model: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    """L1 weighted x4 near objects + 2 MSE + L1 of the chroma error + KL."""
    posterior = model.encode(x).latent_dist
    y = model.decode(posterior.mean + posterior.std * noise).sample
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    weight = 1 + 3 * F.max_pool2d((chroma > 0.1).float(), 3, 1, 1)
    error = y - x
    tint = error - error.mean(1, keepdim=True)
    return (
        (weight * error.abs()).mean()
        + 2 * (weight * error**2).mean()
        + (weight * tint.abs()).mean()
        + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
    )


def evaluate(model: AutoencoderKL, n: int = 512) -> dict[str, float]:
    """PSNR in dB and oracle metrics of reconstructions (from the posterior mean) of unseen pictures."""
    rng = np.random.default_rng(999)
    scenes = sample_scenes(n, rng, weights=(0.2, 0.5, 0.15, 0.15))
    prompts = [recaption(s, rng) for s in scenes]
    x = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = torch.cat([model.decode(model.encode(part).latent_dist.mean).sample for part in x.split(64)])
    mse = ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    judged = judge(y / 2 + 0.5, [p.spec for p in prompts])
    return {"psnr": float((-10 * mse.log10()).mean())} | {k: float(np.nanmean(v)) for k, v in judged.items()}


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save an ordinary diffusers AutoencoderKL with its scaling factor."""
    torch.manual_seed(seed)
    model = components.vae()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.99), weight_decay=1e-4)
    stage = Stage(out / f"{name}.state", model, optimizer)
    model.to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        x = pictures(BATCH, np.random.default_rng([seed, 1, step])).to(memory_format=torch.channels_last)
        return loss(model, x, torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(step)))

    stage.fit(loss_at, steps=steps, lr=LR, warmup=50, every=150, report=lambda: line(evaluate(model, 128)))
    model.eval()
    with torch.no_grad():
        z = torch.cat(
            [model.encode(p).latent_dist.mean for p in pictures(2048, np.random.default_rng(5)).split(128)]
        )
    model.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=0.0)
    print("latent mean", z.mean((0, 2, 3)).tolist(), "std", z.std((0, 2, 3)).tolist(), flush=True)
    metrics = evaluate(model, 1000)
    print(name, "final", line(metrics), flush=True)
    model.save_pretrained(out / name)
    stage.finish(out / f"{name}.json", seed, {"images": stage.step * BATCH} | metrics)
