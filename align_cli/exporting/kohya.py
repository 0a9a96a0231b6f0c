"""LoRA in the layout of kohya-ss/sd-scripts, which AUTOMATIC1111, Forge and ComfyUI read.

One file; a layer is called by its path with underscores, and has `lora_down.weight` (A), `lora_up.weight` (B)
and `alpha`. SD1.x and SD2.x have the paths of diffusers, SDXL's denoiser those of the original code (sgm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report
from align_cli.exporting.lora import Modules, cast, opening, tried
from align_cli.models.parts import LEVEL, is_flat
from align_cli.models.sources import TEXT_ENCODERS

FILE = "lora.safetensors"
RESNETS = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
"""Layer of a residual block in diffusers -> in the original code."""
EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
MIDDLE = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}


def write_kohya(job: Job) -> Report:
    """One file of all parts, opened by `load_lora_weights` of the model's pipeline.

    Raises:
        UserError: SD3, whose layers are others in that layout; all weights were trained and no rank is given.
    """
    if job.adapter.info.family == "sd3":
        raise UserError(
            "kohya's layout of SD3 has query, key and value in one layer, and nothing here could open it to "
            "compare; take --to diffusers or --to peft"
        )
    whole = next((part.name for part in job.parts if not part.lora), None)
    if whole and not job.rank:
        raise UserError(
            f"all weights of the {whole} were trained, and a kohya file holds LoRA: name a rank, for example "
            "--rank 64, or take --to diffusers for all weights"
        )
    return tried(job, job.parts, _save, opening(FILE))


def _save(job: Job, parts: Sequence[Part], modules: Modules) -> dict[str, str]:
    said = save_kohya(job, parts, modules)
    return {FILE: f"{said} in kohya's layout, for AUTOMATIC1111, Forge, ComfyUI and diffusers"}


def save_kohya(job: Job, parts: Sequence[Part], modules: Modules) -> str:
    """Write the file; returns what it holds, in words."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        factors = {layer: part.factors(layer) for layer in part.layers}
        for layer, (a, b) in factors.items():
            name = kohya_name(job.adapter.info.family, part.name, layer, modules[part.name])
            tensors |= cast({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, job.dtype)
            tensors[f"{name}.alpha"] = torch.tensor((part.factor or 1.0) * part.rank)
    first = parts[0]
    facts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": str((first.factor or 1.0) * first.rank),
    }
    save_file(tensors, job.folder / FILE, metadata=facts)
    names = " and ".join(f"{part.name} (rank {part.rank}, {len(part.layers)} layers)" for part in parts)
    return f"LoRA of {names}"


def kohya_name(family: str, part: str, layer: str, module: nn.Module) -> str:
    """What a layer is called in a file. UserError for one that the layout has no name for."""
    if part == "unet":
        config: Any = module.config
        path = sgm_path(layer, config.layers_per_block) if family == "sdxl" else layer
        return "lora_unet_" + path.replace(".", "_")
    if part == "transformer":  # of SD3 kohya has other layers; this is OneTrainer's name
        return "lora_transformer_" + layer.replace(".", "_")
    number = str(TEXT_ENCODERS.index(part) + 1) if family in ("sdxl", "sd3") else ""
    level = LEVEL if is_flat(module) else ""
    return f"lora_te{number}_" + f"{level}{layer}".replace(".", "_")


def sgm_path(layer: str, per_block: int) -> str:
    """The path in the original code of SDXL of a layer of diffusers' UNet.

    per_block: residual blocks of a level on the way down; up it has one more.
    Source: convert_original_stable_diffusion_to_diffusers.py of diffusers, the other way round.
    """
    if layer in EMBEDDINGS:
        return EMBEDDINGS[layer]
    side, *path = layer.split(".")
    try:
        if side == "mid_block":
            kind, number, *rest = path
            root = f"middle_block.{MIDDLE[kind, number]}"
        else:
            level, kind, number, *rest = path
            place = int(level) * (per_block + 1) + int(number)
            sub = ["resnets", "attentions"].index(kind)
            names = {"down_blocks": f"input_blocks.{place + 1}", "up_blocks": f"output_blocks.{place}"}
            root = f"{names[side]}.{sub}"
        inside = RESNETS[".".join(rest)] if kind == "resnets" else ".".join(rest)
    except (KeyError, ValueError) as error:
        raise UserError(f"kohya's layout has no name for the layer {layer}; take --to diffusers") from error
    return f"{root}.{inside}"
