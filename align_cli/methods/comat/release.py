"""The official CoMat checkpoint `pytorch_lora_weights.safetensors`, read: the LoRA of the UNet's attention.

Its keys begin with `unet.` twice; the discriminator lies beside it, in `D_sd/`. The file says nothing about
itself: what the shapes tell is taken from them, the rest from the official scripts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor, nn

from align_cli import config
from align_cli.adapters import NOT_RECORDED, OFFICIAL, AdapterInfo, load_pickle, load_safetensors
from align_cli.errors import UserError
from align_cli.files import checkpoint_step, released_file
from align_cli.models.loading import model_id
from align_cli.models.lora import UNET_ATTENTION, lora_layers
from align_cli.models.parts import family_of, outline
from align_cli.models.states import LORA_A, LORA_B, attention_lora_key, check_state

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "pytorch_lora_weights.bin")
"""Names in the folder of a checkpoint; the second is what diffusers writes without safetensors."""
SUFFIXES = (".safetensors", ".bin")
LORA = "unet"
"""Group of the LoRA in an adapter."""
BESIDE = "D_sd"
"""Folder of the discriminator in a checkpoint."""
FAMILIES = ("sd15", "sd21", "sdxl")
MODELS = {768: "sd15", 1024: "sd21-base", 2048: "sdxl"}
"""Width of the text that a UNet reads -> a base model that has it."""
SIZE = 512
"""Pixels of the official pictures, for SDXL too."""

IMPORTED = "imported file"
COMMAND: dict[str, object] = {
    "comat.steps": 50, "comat.grad_steps": 5, "comat.guidance": 7.5, "comat.detach_input": False,
    "comat.rewards": {"blip-caption": 1.0}, "comat.token_weight": 1e-3, "comat.pixel_weight": 5e-5,
    "comat.attention_steps": 2, "comat.entities": "official", "comat.fidelity_weight": 1.0,
    "comat.lr_discriminator": 2e-5, "comat.discriminator_beta1": 0.0,
}  # fmt: skip
"""What sd15.sh sets, or the code does."""
SDXL: dict[str, object] = {
    "comat.detach_input": True, "comat.official_range": True, "comat.fidelity_weight": 0.5,
    "comat.discriminator": "sd15", "comat.lr_discriminator": 5e-5,
}  # fmt: skip
"""What is different with sdxl.sh."""
DRAWING: dict[str, object] = {
    "sample.sampler": "ddpm", "sample.spacing": "leading", "sample.steps": 50, "sample.guidance": 7.5,
}  # fmt: skip
"""How its validation draws."""


def read_release(path: Path, model: str) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What an official checkpoint holds, as the content of an adapter.

    Args:
        path: pytorch_lora_weights.safetensors or a file like it, also .bin; or the folder that holds it. Of a
        discriminator beside it a warning says that it is left out. model: base model that it was trained on.
    Raises:
        UserError: nothing of the kind there, several of the kind, something besides LoRA of the UNet's
        attention, or tensors for another model.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UserError(
            f"released files of CoMat are for Stable Diffusion 1.5 and XL, and {model} is of the family "
            f"{family}; name their base model with --model"
        )
    file = released_file(path, FILES, SUFFIXES) if path.is_dir() else path
    unet: Any = outline(model, "unet")
    state = read_state(file)
    rank = _fit(state, unet, file, model)
    if (file.parent / BESIDE).is_dir():
        warnings.warn(
            f"{file.parent / BESIDE}, the discriminator, is left out: only its training needs it",
            stacklevel=2,
        )
    values: dict[str, object] = {"comat.lora_rank": rank}
    official = COMMAND | (SDXL if family == "sdxl" else {}) | DRAWING
    if unet.config.sample_size * 8 >= SIZE:  # else a tiny model, which draws nothing of this size
        official |= {"comat.image_size": SIZE, "sample.image_size": SIZE}
    resolved = config.resolve("comat", preset=config.NO_PRESET, flags=values | official)
    known = dict.fromkeys(official, OFFICIAL) | dict.fromkeys(values, IMPORTED)
    held, sections = resolved.to_dict(), ("comat", "sample")
    info = AdapterInfo(
        method="comat",
        model_id=model_id(model),
        family=family,
        step=checkpoint_step(file.parent) or 0,
        source=f"official release, imported from {file.name}",
        config={"method": "comat"} | {section: held[section] for section in sections},
        origin={
            key: known.get(key, NOT_RECORDED) for key in resolved.origin if key.partition(".")[0] in sections
        },
    )
    return info, {f"{LORA}.{key}": value for key, value in state.items()}


def official_key(key: str) -> str:
    """Key of the file for one of a LoRA: "LAYER.lora_A.weight" -> "unet.unet.LAYER.lora.down.weight"."""
    side = "down" if key.endswith(LORA_A) else "up"
    return f"unet.unet.{key.removesuffix(LORA_A).removesuffix(LORA_B)}.lora.{side}.weight"


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a file as a LoRA holds them, float32. All spellings of diffusers are read, with `unet.`
    before them twice, once or not at all.

    Raises:
        UserError: it cannot be read safely, holds no LoRA or something besides, one layer twice, a LoRA whose
        alpha is not its rank, or values that are no finite numbers.
    """
    content: Any = load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file, ())
    if not isinstance(content, Mapping) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{file} holds no tensors by name, as the official code of CoMat saves them")
    if not content:
        raise UserError(f"{file} is no checkpoint of CoMat: it holds nothing")
    if file.suffix == ".safetensors":
        _check_alpha(file)
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        own = attention_lora_key(str(key))
        if own is None:
            raise UserError(
                f"{file} holds {key}, which is no LoRA of the UNet's attention as CoMat trains it"
            )
        if own in state:
            raise UserError(f"{file} holds {own} twice, in two spellings")
        if not torch.is_floating_point(value) or not torch.isfinite(value).all():
            raise UserError(f"{file}: {key} holds values that are no finite numbers")
        state[own] = value.detach().float().contiguous()
    return state


def _check_alpha(file: Path) -> None:
    """UserError where what newer versions of diffusers write beside the tensors says another scale than 1."""
    with safe_open(file, "pt") as opened:
        said = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
    try:
        facts = json.loads(said)
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {LORA_ADAPTER_METADATA_KEY}: {error}") from error
    rank, alpha = facts.get("unet.r"), facts.get("unet.lora_alpha")
    if rank != alpha:
        raise UserError(f"{file} says alpha {alpha} of rank {rank}; a LoRA of CoMat has alpha = rank")


def _fit(state: Mapping[str, Tensor], unet: nn.Module, file: Path, model: str) -> int:
    """The rank of a LoRA on all attention of the UNet. UserError for one that is another model's."""
    config: Any = unet.config
    wide = next((x for key, x in state.items() if key.endswith(f"attn2.to_k{LORA_A}") and x.ndim == 2), None)
    if wide is not None and (width := wide.shape[1]) != config.cross_attention_dim:
        name = f", for example {MODELS[width]}" if width in MODELS else ""
        raise UserError(
            f"{file} is for text of width {width}, and that of {model} has {config.cross_attention_dim}; "
            f"name its base model with --model{name}"
        )
    rank = next((len(x) for key, x in state.items() if key.endswith(LORA_A) and x.ndim == 2), 0)
    shapes: dict[str, list[int]] = {}
    for name, layer in lora_layers(unet, UNET_ATTENTION).items():
        o, i = layer.weight.shape
        shapes |= {name + LORA_A: [rank, i], name + LORA_B: [o, rank]}
    try:
        check_state(shapes, state)
    except ValueError as error:
        raise UserError(
            f"{file} and {model} do not fit: {error}; name its base model with --model"
        ) from error
    return rank
