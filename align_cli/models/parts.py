"""Single modules of a pipeline, by the name of the pipeline: their outline without weights, or loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel

from align_cli import registry
from align_cli.errors import UserError, first_line
from align_cli.models.loading import (
    DIFFUSERS_CLASSES,
    FAMILIES,
    LOAD_ERRORS,
    SDXL,
    load_part_of,
    outline_of,
    pipeline_kind,
    quiet,
)
from align_cli.models.sources import find, read_json, with_config, with_parts
from align_cli.models.unet import unet_family

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""text_encoder/config.json of SD1.x and SDXL: openai/clip-vit-large-patch14."""
SD1_UNET = {"sample_size": 64, "cross_attention_dim": 768}
"""unet/config.json of SD1.x, as far as it differs from the defaults of diffusers."""

LEVEL = "text_model."
"""Prefix of the parameters of CLIPTextModel up to transformers 5.5, and in files that every version reads."""

STABLE_DIFFUSION = "StableDiffusionPipeline"
_SD1: dict[str, dict[str, Any]] = {"text_encoder": CLIP_L, "unet": SD1_UNET}
KNOWN: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sd14": (STABLE_DIFFUSION, _SD1),
    "sd15": (STABLE_DIFFUSION, _SD1),
    "sdxl": (SDXL, {"text_encoder": CLIP_L}),
}
"""Alias -> class of the pipeline and configurations of its parts, so that outlines of these need no file."""


def outline(model: str, part: str) -> nn.Module:
    """The module `part` (text_encoder, unet, ...) of a pipeline on torch's meta device: names, shapes and
    configuration. Of a hub model at most its configurations are fetched.

    Raises:
        UserError: unknown model, a pipeline without this part, no network and not cached.
    """
    kind, known = _known(model)
    source = None
    if part not in known:
        source = find(model)
        kind = pipeline_kind(source)
        if not source.names(part) or part not in FAMILIES[kind].parts:
            raise UserError(f"{source.label} has no {part}")
        source = with_config(source, part)
    config = known[part] if source is None else read_json(source.folder / part / "config.json", source.label)
    try:
        return outline_of(FAMILIES[kind].parts[part], config)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read the {part} of {model}: {first_line(error)}") from error


def load_part(model: str, part: str) -> nn.Module:
    """The module `part` of a pipeline with its weights, float32, on the CPU.

    Raises:
        UserError: as `outline`; missing or damaged weights.
    """
    source = find(model)
    cls = FAMILIES[pipeline_kind(source)].parts[part]
    with quiet():
        return load_part_of(cls, with_parts(source, [part], half=False), part, torch.float32)


def pipeline_class(model: str) -> str:
    """`_class_name` of a pipeline, of a family that is supported. UserError for another."""
    return _known(model)[0] or pipeline_kind(find(model))


def family_of(model: str) -> str:
    """sd15, sd21, sdxl or sd3, without weights. UserError for another pipeline."""
    kind = pipeline_class(model)
    if kind == SDXL:
        return "sdxl"
    if FAMILIES[kind].denoiser == "transformer":
        return "sd3"
    text: Any = outline(model, "text_encoder")
    return unet_family(text.config.hidden_size)


def is_flat(module: nn.Module) -> bool:
    """Whether it is a text encoder whose parameters lack `LEVEL`."""
    return isinstance(module, CLIPTextModel) and not hasattr(module, LEVEL.rstrip("."))


def is_diffusers(module: nn.Module) -> bool:
    """Whether diffusers saves and opens it; else transformers does."""
    return type(module) in DIFFUSERS_CLASSES


def _known(model: str) -> tuple[str, dict[str, dict[str, Any]]]:
    where = registry.model_source(model)
    return next((known for alias, known in KNOWN.items() if registry.MODELS[alias] == where), ("", {}))
