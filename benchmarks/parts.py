"""What the benchmarks share: denoisers of several sizes with random weights, time, peak memory, versions."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from align_cli.diffusion.process import NoiseProcess
from align_cli.models.architectures import ARCHITECTURES
from align_cli.models.attention import AttentionMaps
from align_cli.models.base import TextCond
from align_cli.models.unet import unet_predict
from align_cli.shapes.build import components

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "medium": {
        "sample_size": 16,
        "down_block_types": (DOWN, DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", UP, UP),
        "block_out_channels": (96, 192, 192),
        "layers_per_block": 2,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
    },
    "real": ARCHITECTURES["sd15"].parts["unet"],
}
"""SD1.5's UNet; real is the published one."""
XL: dict[str, dict[str, Any]] = {
    "medium": {
        **UNETS["medium"],
        "cross_attention_dim": 512,
        "transformer_layers_per_block": (1, 2, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 256 + 6 * 256,
    },
    "real": ARCHITECTURES["sdxl"].parts["unet"] | {"sample_size": 64},
}
MMDITS: dict[str, dict[str, Any]] = {
    "medium": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "caption_projection_dim": 256,
        "joint_attention_dim": 512,
        "pooled_projection_dim": 512,
        "pos_embed_max_size": 32,
    },
    "real": ARCHITECTURES["sd3"].parts["transformer"] | {"sample_size": 64},
}
"""SD3's transformer; real is that of stable-diffusion-3-medium, at the 512 pixels of training."""
SMALL = {"sd15": components.unet, "sdxl": components.sdxl_unet, "sd3": components.transformer}
"""The embedded models."""
TEXT_ROWS = {"small": 32, "medium": 77, "real": 77}
T5_ROWS = {"small": 32, "medium": 77, "real": 512}


def denoiser(family: str, size: str) -> Any:
    """A denoiser with random weights."""
    torch.manual_seed(0)
    if size == "small":
        return SMALL[family]()
    if family == "sd3":
        return SD3Transformer2DModel(**MMDITS[size])
    return UNet2DConditionModel(**(UNETS if family == "sd15" else XL)[size])


class RandomModel:
    """SD1.5's UNet with random weights and texts that mean nothing; no autoencoder, no text encoder."""

    family, model_id = "sd15", "random"
    dtype = torch.float32

    def __init__(self, size: str, device: str) -> None:
        self.denoiser = denoiser("sd15", size).to(device).requires_grad_(False).eval()
        self.device = self.encoder_device = torch.device(device)
        if device == "cpu":  # as the model loader does
            self.denoiser.to(memory_format=torch.channels_last)
        self.summary_width = int(self.denoiser.config.cross_attention_dim)
        self.rows = TEXT_ROWS[size]
        self.process = NoiseProcess.from_scheduler_config(dict(components.scheduler().config))

    def encode_text(self, prompts: list[str]) -> TextCond:
        g = torch.Generator().manual_seed(sum(map(len, prompts)))
        tokens = torch.randn(len(prompts), self.rows, self.summary_width, generator=g)
        return TextCond(tokens.to(self.device))

    def summarised(self, prompts: list[str]) -> tuple[TextCond, Tensor]:
        cond = self.encode_text(prompts)
        return cond, cond.tokens[:, 0]

    def predict(self, z: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        return unet_predict(self.denoiser, z, t, cond, keep)


def in_turns(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `run` holds at its fullest, on top of what is there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = peak = 0
    events = found.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def facts(device: str, threads: int) -> dict[str, object]:
    """Versions and machine."""
    machine = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    found: dict[str, object] = {name: version(name) for name in ("torch", "diffusers")}
    return found | {"machine": machine, "threads": threads}
