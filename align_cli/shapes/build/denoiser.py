"""Train the denoiser of one family on cached latents; one or two gloo processes of one thread each."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor, nn

from align_cli.diffusion.rollout import rollout
from align_cli.settings import PROMPT_KINDS
from align_cli.shapes.build.latents import Captions, Latents
from align_cli.shapes.build.painters import PAINTERS, Painter
from align_cli.shapes.build.run import Stage
from align_cli.shapes.captions import recaption
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.oracle import judge

BATCH = 32
"""Pictures per process and step."""
LR = 1e-3
REFINE_LR = 5e-4
DROPOUT = 0.1
LONG_RATE = 0.15
EMA = 0.9975


def loss(model: Painter, x0: Tensor, ids: Tensor, empty: Tensor, rng: torch.Generator) -> Tensor:
    """Weighted squared error of the model's own target, t drawn as 1000 sqrt(u): binding and layout are
    decided early.
    """
    t = model.times((1000 * torch.rand(len(x0), generator=rng).sqrt()).long().clamp(max=999))
    eps = torch.randn(x0.shape, generator=rng)
    goal = model.goal(x0, eps, t, ids, empty)
    error = model(model.process.add_noise(x0, eps, t), t, ids, empty) - goal
    return (error.square().mean((1, 2, 3)) * model.weight(t)).mean()


@torch.no_grad()
def sample(model: Painter, captions: Captions, texts: list[str], guidance: float) -> Tensor:
    """Latents after 20 steps."""
    parts = []
    z = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in range(0, len(texts), 32):
        some = texts[k : k + 32]
        cond = model.encode(captions.ids(some), torch.tensor([text == "" for text in some]))
        uncond = model.encode(captions.ids([""] * len(some)), torch.ones(len(some), dtype=torch.bool))
        parts.append(
            rollout(
                model.predict,
                model.process,
                z[k : k + 32],
                steps=20,
                cond=cond,
                uncond=uncond,
                guidance=guidance,
                sampler=model.sampler,
            )
        )
    return torch.cat(parts)


def evaluate(model: Painter, captions: Captions, vae: AutoencoderKL, n: int, split: str) -> str:
    """Oracle metrics on pictures drawn for `n` prompts, and `all` by kind, as one line."""
    prompts = eval_prompts(n, 7, split=split, kinds=PROMPT_KINDS)
    z = sample(model, captions, [p.text for p in prompts], 4.0)
    with torch.no_grad():
        x = torch.cat([vae.decode(p / vae.config.scaling_factor).sample for p in z.split(64)]) / 2 + 0.5
    judged = judge(x, [p.spec for p in prompts])
    parts = [f"{k} {np.nanmean(v):.3f}" for k, v in judged.items()]
    kinds = np.array([p.kind for p in prompts])
    parts += [f"{k}:{judged['all'][kinds == k].mean():.2f}" for k in PROMPT_KINDS]
    return " ".join(parts)


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save the averaged weights.

    name: a stage of `PAINTERS`, or one of them and "-refine", which goes on from it under a new cosine.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    first = name.removesuffix("-refine")
    model = PAINTERS[first](out).eval()  # no dropout anywhere
    refining = name != first
    if refining:
        model.load_state_dict(torch.load(out / f"{first}.state", weights_only=True)["average"])
    lr = REFINE_LR if refining else LR
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), weight_decay=0.01)
    stage = Stage(out / f"{name}.state", model, optimizer, average=average.state_dict())
    if rank == 0:
        latents = Latents(out, seed)
    if world > 1:
        dist.barrier()
    if rank:
        latents = Latents(out, seed)
    captions = Captions(out)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 6 if refining else 4, step, rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.integers(0, len(latents.scenes), BATCH)
        x0 = latents.mean[rows] + latents.std[rows] * torch.randn(BATCH, 4, 8, 8, generator=generator)
        texts = [recaption(latents.scenes[i], rng, long_rate=LONG_RATE).text for i in rows]
        texts = [t if rng.random() > DROPOUT else "" for t in texts]
        return loss(model, x0, captions.ids(texts), torch.tensor([t == "" for t in texts]), generator)

    @torch.no_grad()
    def after_step(step: int) -> None:
        decay = min(EMA, step / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

    def report() -> str:
        return "" if stage.step % 1000 else evaluate(average, captions, vae, 160, "train")

    stage.fit(
        loss_at,
        steps=steps,
        lr=lr,
        warmup=100,
        every=200,
        report=report,
        main=rank == 0,
        average_gradients=(lambda: _average_gradients(model, world)) if world > 1 else None,
        after_step=after_step,
    )
    if rank == 0:
        average.save(out / name)
        for split in ("train", "test"):
            print(f"{name} final {split} {evaluate(average, captions, vae, 500, split)}", flush=True)
        measured = {"processes": world, "images": stage.step * BATCH * world}
        stage.finish(out / f"{name}.json", seed, measured)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _average_gradients(model: nn.Module, world: int) -> None:
    """Average gradients over processes as one flat tensor."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    offset = 0
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g) / world)
        offset += g.numel()
