"""One TextCraftor training step against the straightforward form: the loop of the official code, in which a
checkpoint goes around every gradient step, all pictures are decoded and scored in one graph, and UNet,
autoencoder and rewards are left unfrozen. Random weights; time, peak memory, difference of loss and gradient,
in one run.

    python benchmarks/textcraftor_step.py --size medium --batch 4 --threads 2
    python benchmarks/textcraftor_step.py --size real --batch 4 --device cuda

Memory is what the step allocates on top of weights and inputs (gradients included). Times are medians of
steps taken in turns. On a GPU, FLOPs are counted by torch and set against --peak-tflops as model FLOPs
utilisation; what checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from parts import TEXT_ROWS, denoiser, facts, peak_memory
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from align_cli.diffusion.process import NoiseProcess
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.methods.textcraftor.method import TextCraftor
from align_cli.models.base import TextCond
from align_cli.models.unet import UNetModel
from align_cli.rewards.base import Reward
from align_cli.rewards.preprocess import TEXTCRAFTOR
from align_cli.shapes.build import components

VAES: dict[str, dict[str, Any]] = {
    "medium": {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8},
    "real": {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
}
"""Decoders; real is that of stable-diffusion-v1-5."""
TEXTS = {
    "medium": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "real": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
TOWERS = {
    "medium": {
        "image_size": 224, "patch_size": 32, "hidden_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "intermediate_size": 1024,
    },
    "real": {
        "image_size": 224, "patch_size": 14, "hidden_size": 1280, "num_hidden_layers": 32,
        "num_attention_heads": 16, "intermediate_size": 5120,
    },
}  # fmt: skip
"""Image towers of the reward; real is that of HPSv2."""


class Words:
    """A tokenizer for models whose text means nothing: every prompt is a row of numbers."""

    model_max_length = 77

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, prompts: list[str], **_: Any) -> dict[str, Tensor]:
        rows = [[(7 * len(p) + 13 * k) % 400 + 3 for k in range(self.length)] for p in prompts]
        return {"input_ids": torch.tensor(rows)}


class Similarity(Reward):
    """A CLIP reward with random towers; prompts are numbers, too."""

    def __init__(self, size: str, device: torch.device) -> None:
        super().__init__(name="clip", version="random", source="", preprocessing="", scale="", device=device)
        torch.manual_seed(3)
        text = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(text_config=text, vision_config=TOWERS[size], projection_dim=64)
        self.model = CLIPModel(config).to(device).eval()

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        pixels = TEXTCRAFTOR(images, 224)
        vectors = self.model.get_image_features(pixel_values=pixels).pooler_output
        with torch.no_grad():
            ids = Words(8)(list(prompts))["input_ids"].to(self.device)
            text = self.model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.cosine_similarity(vectors, text)


def make_model(size: str, device: str) -> UNetModel:
    unet = denoiser("sd15", size)
    torch.manual_seed(1)
    if size == "small":
        vae = components.vae()
    else:
        blocks = len(VAES[size]["block_out_channels"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
            latent_channels=4,
            **VAES[size],
        )
    width = unet.config.cross_attention_dim
    shape = TEXTS.get(size, {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4})
    text = CLIPTextModel(CLIPTextConfig(vocab_size=512, intermediate_size=4 * width, **shape))
    if device == "cpu":  # as the model loader does
        unet.to(memory_format=torch.channels_last)
    return UNetModel(
        model_id="random",
        tokenizer=Words(TEXT_ROWS[size]),  # type: ignore[arg-type]
        text_encoder=text.to(device),
        vae=vae.to(device),
        unet=unet.to(device),
        process=NoiseProcess.from_scheduler_config(dict(components.scheduler().config)),
    )


def straightforward(method: TextCraftor, prompts: list[str], noise: Tensor) -> float:
    """The step as train_textcraftor.py takes it."""
    model, c = method.model, method.config
    (reward,) = method.rewards.rewards.values()
    modules = (model.denoiser, model.vae, reward.model)  # type: ignore[attr-defined]
    for module in modules:
        module.requires_grad_(True)
    tower = method.tunings["text_encoder"].module  # type: ignore[union-attr]

    def texts() -> TextCond:
        return TextCond(torch.cat([model.uncond(len(prompts)).tokens, model.encode_text(prompts).tokens]))

    with torch.no_grad():
        frozen = texts()
    with model.using(encoders={0: tower}):
        tuned = texts()
    z, abar = noise, model.process.alphas_cumprod.to(noise.device)  # type: ignore[attr-defined]
    stride = 1000 // c.steps
    for i, t in enumerate(model.process.timesteps(c.steps, "lead").tolist()):
        first = c.first_tuned(c.steps, c.grad_steps)
        inputs = torch.cat([z, z]), torch.tensor(t, device=z.device), frozen if i < first else tuned
        if i < first:
            with torch.no_grad():
                pred = model.predict(*inputs)
        else:
            pred = checkpoint(model.predict, *inputs, use_reentrant=False)
        u, v = pred.chunk(2)
        eps = u + c.guidance * (v - u)
        before = abar[t - stride] if t >= stride else abar[0]
        x0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        z = before.sqrt() * x0 + (1 - before).sqrt() * eps
    (weight,) = c.rewards.values()
    loss = -weight * reward.score(model.decode(z), prompts).mean()
    loss.backward()
    for module in modules:
        module.requires_grad_(False)
        for p in module.parameters():
            p.grad = None
    return float(loss.detach())


def ours(method: TextCraftor, prompts: list[str], noise: Tensor) -> float:
    """The step as the training loop takes it."""
    ctx = StepContext(step=0, rng=torch.Generator(), backward=lambda loss: loss.backward())
    return method.climb(Batch(prompts), noise, ctx)["loss"]


FORMS: dict[str, dict[str, Any]] = {
    "straightforward": {},
    "ours": {},
    "ours, decode_chunk 0": {"decode_chunk": 0},
    "ours, kept_steps 0": {"kept_steps": 0},
    "ours, kept_steps 0, checkpoint_vae": {"kept_steps": 0, "checkpoint_vae": True},
    "ours, kept_steps 2": {"kept_steps": 2},
    "ours, kept_steps 5": {"kept_steps": 5},
}


def measure(size: str, options: argparse.Namespace) -> list[dict[str, object]]:
    model = make_model(size, options.device)
    reward = Similarity("medium" if size == "small" else size, model.device)
    reward.model.requires_grad_(False)
    side = model.denoiser.config.sample_size
    noise = torch.randn(options.batch, 4, side, side, generator=torch.Generator().manual_seed(1))
    noise = noise.to(model.device)
    prompts = ["a " * (k + 1) for k in range(options.batch)]
    config = TextCraftorConfig(rewards={"clip": 100.0}, steps=options.steps, grad_steps=options.grad_steps)
    runs: dict[str, Callable[[], float]] = {}
    methods: dict[str, TextCraftor] = {}
    for name, change in FORMS.items():
        method = TextCraftor(model, replace(config, **change))
        method.use_rewards({"clip": reward})
        form = straightforward if name == "straightforward" else ours
        methods[name] = method

        def run(method: TextCraftor = method, form: Any = form) -> float:
            for p in method.tunings["text_encoder"].parameters():
                p.grad = None
            return form(method, prompts, noise)

        runs[name] = run
    losses = {name: run() for name, run in runs.items()}  # warm, too
    grads = {name: gradient(method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeat):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    memory = {name: peak_memory(run, model.device) for name, run in runs.items()}
    first, flops = "straightforward", 0
    if model.device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            runs["ours, kept_steps 5"]()
        flops = counter.get_total_flops()
    rows = []
    for name in runs:
        seconds = statistics.median(times[name])
        row: dict[str, object] = {
            "size": size,
            "batch": options.batch,
            "form": name,
            "seconds": round(seconds, 3),
            "time_ratio": round(seconds / statistics.median(times[first]), 3),
            "peak_mib": round(memory[name] / 2**20, 1),
            "memory_ratio": round(memory[name] / memory[first], 3),
            "loss_difference": abs(losses[name] - losses[first]),
            "gradient_difference": float((grads[name] - grads[first]).norm() / grads[first].norm()),
        }
        if flops:
            row |= {"tflop": flops / 1e12, "mfu": round(flops / seconds / options.peak_tflops / 1e12, 3)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def gradient(method: TextCraftor) -> Tensor:
    parameters = method.tunings["text_encoder"].parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["small"], choices=["small", "medium", "real"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--grad-steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-tflops", type=float, default=67.0, help="float32; 989 for bf16 on an H100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # as the training loop does
    found = facts(options.device, options.threads)
    print(json.dumps(found), flush=True)
    rows = [row for size in options.size for row in measure(size, options)]
    if options.json:
        options.json.write_text(json.dumps({"facts": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
