"""Files of DPT for tests: adapters with random values, and the layout of the official checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cli.adapters import AdapterInfo, write_adapter
from align_cli.models.lora import LoraTuning, attention_layers

SMALL: dict[str, Any] = {
    "hidden_dim": 16, "num_heads": 8, "feedforward_dim": 24, "num_grounding_queries": 5, "phrase_dim": 6,
    "lora_rank": 2,
}  # fmt: skip
"""Settings of a small discriminator whose file says all that is not official."""


def official(
    *,
    d: int = 16,
    hidden: int = 24,
    channels: int = 16,
    queries: int = 15,
    text: int = 32,
    phrases: int = 768,
    phrase_dim: int = 6,
    encoder: int = 1,
    decoder: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A discriminator as `pytorch_model.bin` has it: names and shapes of the official classes, random
    values.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "query_embed.weight": (queries, d),
        "logit_scale": (),
        "input_proj.weight": (d, channels, 1, 1),
        "input_proj.bias": (d,),
        "transformer.decoder.norm.weight": (d,),
        "transformer.decoder.norm.bias": (d,),
    }
    linear = {
        "timestep_embedding.time_embedding.linear_1": (4 * d, d),
        "timestep_embedding.time_embedding.linear_2": (d, 4 * d),
        "map_to_clip.0": (d, d),
        "map_to_clip.2": (text, d),
        "class_embed": (256, d),
        "bbox_embed.layers.0": (d, d),
        "bbox_embed.layers.1": (d, d),
        "bbox_embed.layers.2": (4, d),
        "contrastive_align_projection_image": (phrase_dim, d),
        "contrastive_align_projection_text": (phrase_dim, phrases),
    }
    for part, count, attentions in (
        ("encoder", encoder, ("self_attn",)),
        ("decoder", decoder, ("self_attn", "multihead_attn")),
    ):
        for i in range(count):
            layer = f"transformer.{part}.layers.{i}"
            linear |= {f"{layer}.linear1": (hidden, d), f"{layer}.linear2": (d, hidden)}
            for norm in range(1, len(attentions) + 2):
                shapes |= {f"{layer}.norm{norm}.weight": (d,), f"{layer}.norm{norm}.bias": (d,)}
            for name in attentions:
                shapes |= {
                    f"{layer}.{name}.in_proj_weight": (3 * d, d),
                    f"{layer}.{name}.in_proj_bias": (3 * d,),
                }
                linear[f"{layer}.{name}.out_proj"] = (d, d)
    for name, (o, i) in linear.items():
        shapes |= {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def lora(unet: torch.nn.Module, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The state of a LoRA on all attention, loud enough to be seen."""
    rng = torch.Generator().manual_seed(seed)
    tuning = LoraTuning(unet, rank=rank, alpha=rank, targets=attention_layers, device=torch.device("cpu"))
    return {key: 0.3 * torch.randn(x.shape, generator=rng) for key, x in tuning.state().items()}


def official_lora(unet: torch.nn.Module, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The same with the names that processors of diffusers 0.20 give it."""
    found = {}
    for key, x in lora(unet, rank, seed).items():
        for kind in ("q", "k", "v", "out"):
            own = "to_out.0" if kind == "out" else f"to_{kind}"
            for side, end in (("down", "A"), ("up", "B")):
                tail = f".{own}.lora_{end}.weight"
                if key.endswith(tail):
                    found[f"unet.{key.removesuffix(tail)}.processor.to_{kind}_lora.{side}.weight"] = x
    return found


def save_dpt(folder: Path, model: Any, stage: str = "tune", **settings: Any) -> dict[str, Tensor]:
    """An adapter folder with random values, as small as SMALL; returns its tensors."""
    state = {f"discriminator.{key}": x for key, x in official().items()}
    if stage == "tune":
        state |= {f"unet.{key}": x for key, x in lora(model.denoiser).items()}
    info = AdapterInfo(
        method="dpt",
        stage=stage,
        model_id=model.model_id,
        family=model.family,
        config={"method": "dpt", "dpt": {"stage": stage, **SMALL, **settings}},
    )
    write_adapter(folder, info, state)
    return state
