"""Tiny CLIP models of the real classes as ordinary files: transformers folders, open_clip and HPSv2 files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_tokenizer

SIZE = 16
LAYOUT: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 616, "width": 16, "heads": 2, "layers": 1},
}
"""A tiny model in the words of open_clip."""


def tiny_clip(seed: int = 0) -> Any:
    """A random CLIPModel with towers that differ from picture to picture and from text to text."""
    from transformers import CLIPModel

    from align_cli.rewards.towers import clip_config

    torch.manual_seed(seed)
    model = CLIPModel(clip_config(LAYOUT))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        model.logit_scale.fill_(3.0)
    return model.eval()


def save_clip(folder: Path, model: Any, *, with_tokenizer: bool = True, safe: bool = True) -> Path:
    """A transformers folder. safe: model.safetensors, else pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if safe:
        model.save_pretrained(folder)
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of open_clip, written down independently of the package: the inverse of its key map."""
    out: dict[str, torch.Tensor] = {"logit_scale": state["logit_scale"]}
    for tower, mark in (("vision_model", "visual."), ("text_model", "")):
        layers = {k.split(".")[3] for k in state if k.startswith(f"{tower}.encoder")}
        for n in layers:
            a, b = f"{tower}.encoder.layers.{n}.", f"{mark}transformer.resblocks.{n}."
            for kind in ("weight", "bias"):
                out[f"{b}attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{a}self_attn.{p}_proj.{kind}"] for p in ("q", "k", "v")]
                )
                out[f"{b}attn.out_proj.{kind}"] = state[f"{a}self_attn.out_proj.{kind}"]
                for i in (1, 2):
                    out[f"{b}ln_{i}.{kind}"] = state[f"{a}layer_norm{i}.{kind}"]
                out[f"{b}mlp.c_fc.{kind}"] = state[f"{a}mlp.fc1.{kind}"]
                out[f"{b}mlp.c_proj.{kind}"] = state[f"{a}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    out["visual.class_embedding"] = state[f"{vision}class_embedding"]
    out["visual.conv1.weight"] = state[f"{vision}patch_embedding.weight"]
    out["visual.positional_embedding"] = state[f"{vision}position_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    out["token_embedding.weight"] = state[f"{text}token_embedding.weight"]
    out["positional_embedding"] = state[f"{text}position_embedding.weight"]
    out["text_projection"] = state["text_projection.weight"].T.contiguous()
    return out


def save_hps(folder: Path, model: Any, name: str = "HPS_v2_compressed.pt") -> Path:
    """A folder as a user of HPSv2 may have it: the published file's layout, and open_clip's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "state_dict": to_open_clip(model.state_dict())}, folder / name)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": LAYOUT}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pictures(n: int, size: tuple[int, int] = (20, 28), seed: int = 0, channels: int = 3) -> torch.Tensor:
    """(n, channels, H, W) random 8-bit pictures in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), generator=generator).float() / 255
