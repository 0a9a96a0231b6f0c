"""Train the denoiser of tiny-sd15 on cached latents; one or two gloo processes of one thread each.

The text tower starts as tiny-clip's and is trained along: contrastive training alone leaves it a code of
whole captions, from which the denoiser reads single colours slowly.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel

from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.models.base import TextCond
from align_cli.models.unet import unet_predict
from align_cli.shapes.build import components
from align_cli.shapes.build.latents import Captions, Latents
from align_cli.shapes.build.run import Stage
from align_cli.shapes.captions import PROMPT_KINDS, recaption
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.oracle import judge

BATCH = 32
"""Pictures per process and step."""
LR = 1e-3
DROPOUT = 0.1
LONG_RATE = 0.15
MAX_WEIGHT = 50.0
EMA = 0.9975


class Painter(nn.Module):
    """What is trained: the UNet and the text tower."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet = components.unet().to(memory_format=torch.channels_last)
        self.text = CLIPModel.from_pretrained(folder / "tiny-clip").text_model

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """(B, 4, 8, 8) prediction; ids (B, L)."""
        prediction: Tensor = self.unet(z, t, self.text(ids).last_hidden_state).sample
        return prediction


def loss(model: Painter, process: NoiseProcess, x0: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
    """Mean squared error of the epsilon, t drawn as 1000 sqrt(u): binding and layout are decided early.

    Weighted by min(1 / alpha_bar, MAX_WEIGHT), which is the velocity loss up to the cap.
    """
    t = (1000 * torch.rand(len(x0), generator=rng).sqrt()).long().clamp(max=999)
    eps = torch.randn(x0.shape, generator=rng)
    error = model(process.add_noise(x0, eps, t), t, ids) - process.target(x0, eps, t)
    return (error.square().mean((1, 2, 3)) * (1 / process.alphas_cumprod[t]).clamp(max=MAX_WEIGHT)).mean()


@torch.no_grad()
def sample(
    model: Painter, process: NoiseProcess, captions: Captions, texts: list[str], guidance: float
) -> Tensor:
    """Latents after 20 DDIM steps."""
    parts = []
    z = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in range(0, len(texts), 32):
        some = texts[k : k + 32]
        encode = lambda rows: TextCond(model.text(captions.ids(rows)).last_hidden_state)  # noqa: E731
        predict = lambda z, t, cond: unet_predict(model.unet, z, t, cond)  # noqa: E731
        cond, uncond = encode(some), encode([""] * len(some))
        noise = z[k : k + 32]
        parts.append(rollout(predict, process, noise, steps=20, cond=cond, uncond=uncond, guidance=guidance))
    return torch.cat(parts)


def evaluate(
    model: Painter, process: NoiseProcess, captions: Captions, vae: AutoencoderKL, n: int, split: str
) -> str:
    """Oracle metrics on pictures drawn for `n` prompts, and `all` by kind, as one line."""
    prompts = eval_prompts(n, 7, split=split, kinds=PROMPT_KINDS)
    z = sample(model, process, captions, [p.text for p in prompts], 4.0)
    with torch.no_grad():
        x = torch.cat([vae.decode(p / vae.config.scaling_factor).sample for p in z.split(64)]) / 2 + 0.5
    judged = judge(x, [p.spec for p in prompts])
    parts = [f"{k} {np.nanmean(v):.3f}" for k, v in judged.items()]
    kinds = np.array([p.kind for p in prompts])
    parts += [f"{k}:{judged['all'][kinds == k].mean():.2f}" for k in PROMPT_KINDS]
    return " ".join(parts)


def train(out: Path, steps: int, seed: int) -> None:
    """Train for `steps` and save the averaged weights: UNet2DConditionModel and text tower."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    model = Painter(out).eval()  # no dropout anywhere
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.99), weight_decay=0.01)
    state: dict[str, Tensor] = average.state_dict()
    stage = Stage(out / "denoiser.state", model, optimizer, average=state)
    average.load_state_dict(state)
    if rank == 0:
        latents = Latents(out, seed)
    if world > 1:
        dist.barrier()
    if rank:
        latents = Latents(out, seed)
    captions = Captions(out)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    process = NoiseProcess.from_scheduler_config(dict(components.scheduler().config))

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 4, step, rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.integers(0, len(latents.scenes), BATCH)
        x0 = latents.mean[rows] + latents.std[rows] * torch.randn(BATCH, 4, 8, 8, generator=generator)
        texts = [recaption(latents.scenes[i], rng, long_rate=LONG_RATE).text for i in rows]
        texts = [t if rng.random() > DROPOUT else "" for t in texts]
        return loss(model, process, x0, captions.ids(texts), generator)

    @torch.no_grad()
    def after_step(step: int) -> None:
        decay = min(EMA, step / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

    def report() -> str:
        if stage.step % 1000:
            return ""
        return evaluate(average, process, captions, vae, 160, "train")

    stage.fit(
        loss_at,
        steps=steps,
        lr=LR,
        warmup=100,
        every=200,
        report=report,
        main=rank == 0,
        average_gradients=(lambda: _average_gradients(model, world)) if world > 1 else None,
        after_step=after_step,
    )
    if rank == 0:
        average.unet.save_pretrained(out / "denoiser" / "unet")
        average.text.save_pretrained(out / "denoiser" / "text_encoder")
        components.scheduler().save_pretrained(out / "denoiser" / "scheduler")
        for split in ("train", "test"):
            shown = evaluate(average, process, captions, vae, 500, split)
            print(f"denoiser final {split} {shown}", flush=True)
        measured = {"processes": world, "images": stage.step * BATCH * world}
        stage.finish(out / "denoiser.json", seed, measured)
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
