"""Single modules of a pipeline, by the name of the pipeline: their outline without weights, or loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel

from align_cli import registry
from align_cli.errors import UserError, first_line
from align_cli.models.architectures import ARCHITECTURES, Config
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

LEVEL = "text_model."
"""Prefix of the parameters of CLIPTextModel up to transformers 5.5, and in files that every version reads."""


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


def _known(model: str) -> tuple[str, dict[str, Config]]:
    """Class of the pipeline and configurations of its parts, where they need no file."""
    where = registry.model_source(model)
    alias = next((alias for alias in ARCHITECTURES if registry.MODELS[alias] == where), "")
    return (ARCHITECTURES[alias].pipeline, ARCHITECTURES[alias].parts) if alias else ("", {})
