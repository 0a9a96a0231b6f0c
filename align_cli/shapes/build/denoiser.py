"""Train the denoiser of tiny-sd15 on cached latents; one or two gloo processes of one thread each.

The text tower starts as tiny-clip's. It is frozen for UNFREEZE_STEP steps, as in Stable Diffusion, and then
trained along:
contrastive training alone leaves it a code of whole captions, from which the denoiser reads single colours
slowly.
"""

from __future__ import annotations

import copy
import os
import time
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
from align_cli.shapes.build.run import Clock, Resumable
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
UNFREEZE_STEP = 3400


class Painter(nn.Module):
    """What is trained: the UNet and, later on, the text tower."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet = components.unet().to(memory_format=torch.channels_last)
        self.text = CLIPModel.from_pretrained(folder / "tiny-clip").text_model

    def forward(self, z: Tensor, t: Tensor, ids: Tensor, *, train_text: bool = False) -> Tensor:
        """(B, 4, 8, 8) prediction; ids (B, L)."""
        with torch.set_grad_enabled(train_text and torch.is_grad_enabled()):
            cond = self.text(ids).last_hidden_state
        prediction: Tensor = self.unet(z, t, cond).sample
        return prediction


def loss(
    model: Painter, process: NoiseProcess, x0: Tensor, ids: Tensor, rng: torch.Generator, *, train_text: bool
) -> Tensor:
    """Mean squared error of the model's own target, t drawn as 1000 sqrt(u): binding and layout are decided
    early.

    An epsilon model is weighted by min(1 / alpha_bar, MAX_WEIGHT), which is the velocity loss up to the cap.
    """
    t = (1000 * torch.rand(len(x0), generator=rng).sqrt()).long().clamp(max=999)
    eps = torch.randn(x0.shape, generator=rng)
    error = model(process.add_noise(x0, eps, t), t, ids, train_text=train_text) - process.target(x0, eps, t)
    each = error.square().mean((1, 2, 3))
    if process.prediction_type == "epsilon":
        each = each * (1 / process.alphas_cumprod[t]).clamp(max=MAX_WEIGHT)
    return each.mean()


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


def train(out: Path, minutes: float, seed: int, prediction: str = "epsilon") -> None:
    """Train for `minutes` of wall clock and save an ordinary diffusers UNet2DConditionModel and the text
    tower, EMA weights.
    """
    name = "denoiser"
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    model = Painter(out).eval()  # no dropout anywhere
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.99), weight_decay=0.01)
    state: dict[str, Tensor] = average.state_dict()
    run = Resumable(out / f"{name}.state", model, optimizer, average=state)
    average.load_state_dict(state)
    if rank == 0:
        latents = Latents(out, seed)
    if world > 1:
        dist.barrier()
    if rank:
        latents = Latents(out, seed)
    captions = Captions(out)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    process = NoiseProcess.from_scheduler_config(dict(components.scheduler(prediction).config))
    clock = Clock(minutes, run.seconds)
    start, shown, running = time.time(), run.step, 0.0
    over = False
    while not over:
        key = [seed, 4, run.step, rank]
        rng = np.random.default_rng(key)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.integers(0, len(latents.scenes), BATCH)
        x0 = latents.mean[rows] + latents.std[rows] * torch.randn(BATCH, 4, 8, 8, generator=generator)
        texts = [recaption(latents.scenes[i], rng, long_rate=LONG_RATE).text for i in rows]
        texts = [t if rng.random() > DROPOUT else "" for t in texts]
        train_text = run.step >= UNFREEZE_STEP
        value = loss(model, process, x0, captions.ids(texts), generator, train_text=train_text)
        value.backward()
        seconds = clock.seconds()
        if world > 1:
            seconds = _average_gradients(model, world, seconds)
        over = seconds >= clock.limit
        rate = clock.cosine(LR, run.step, warmup=100, seconds=seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        with torch.no_grad():
            decay = min(EMA, run.step / (run.step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += value.item()
        if run.step % 200 == 0 and rank == 0:
            run.save(clock.seconds())
            speed = (run.step - shown) * BATCH * world / (time.time() - start)
            print(
                f"{name} step {run.step} loss {running / (run.step - shown):.4f} {speed:.0f} img/s",
                flush=True,
            )
            if run.step % 1000 == 0:
                print(
                    f"  {run.step * BATCH * world} {evaluate(average, process, captions, vae, 160, 'train')}",
                    flush=True,
                )
            start, shown, running = time.time(), run.step, 0.0
    if rank == 0:
        average.unet.save_pretrained(out / name / "unet")
        average.text.save_pretrained(out / name / "text_encoder")
        components.scheduler(prediction).save_pretrained(out / name / "scheduler")
        for split in ("train", "test"):
            print(f"{name} final {split} {evaluate(average, process, captions, vae, 500, split)}", flush=True)
        run.finish(out / f"{name}.json", clock.seconds(), {"images": run.step * BATCH * world})
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _average_gradients(model: nn.Module, world: int, seconds: float) -> float:
    """Average gradients over processes as one flat tensor; returns the first process's clock, so that all
    agree.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    clock = torch.tensor([seconds if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([g.reshape(-1) for g in grads] + [clock])
    dist.all_reduce(flat)
    offset = 0
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g) / world)
        offset += g.numel()
    return float(flat[-1])
