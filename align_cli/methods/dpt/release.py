"""The official DPT checkpoint `pytorch_model.bin`, read and written: discriminator and, of stage tune, LoRA.

It is a flat dict of what was trained, and says nothing about itself: what the shapes tell is taken from them,
the rest from the official commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from align_cli import config, registry
from align_cli.adapters import NOT_RECORDED, OFFICIAL, AdapterInfo, load_pickle, load_safetensors
from align_cli.errors import UserError
from align_cli.files import checkpoint_step, released_file
from align_cli.methods.dpt.config import DISCRIMINATOR, DPTConfig, feature_names
from align_cli.methods.dpt.discriminator import Discriminator
from align_cli.models.features import block_channels, own_feature
from align_cli.models.loading import model_id
from align_cli.models.lora import UNET_ATTENTION, lora_layers
from align_cli.models.parts import family_of, outline
from align_cli.models.states import LORA_A, LORA_B, attention_lora_key, by_group, check_state

FILE = "pytorch_model.bin"
FILES = (FILE, "model.safetensors")
"""Names in the folder of an official checkpoint; accelerate has written the second since version 0.23."""
SUFFIXES = (".bin", ".safetensors")
FAMILIES = ("sd15", "sd21")
MATCHING_QUERIES = 10
"""Of the queries in a file, those for matching come first; how many, only the official command tells."""
CONCATENATED = ("bottom1_up0", "bottom0_up1", "bottom2_bottom3_mid")
"""Features of several blocks that the official code accepts."""
PHRASE_ENCODERS = {768: "FacebookAI/roberta-base", 1024: "FacebookAI/roberta-large"}
"""Width of the phrase's states -> the official one that has it."""
TINY_PHRASES = "embedded:tiny-roberta"
PARTS = (
    "transformer", "query_embed", "input_proj", "timestep_embedding", "map_to_clip", "logit_scale",
    "class_embed", "bbox_embed", "contrastive_align_projection_image", "contrastive_align_projection_text",
)  # fmt: skip
"""First words of the keys of every discriminator."""
FUSION, POSITIONS = "fusion_proj", "position_embedding"
"""Those of a discriminator of all blocks (all-C-S), and of one with learned positions."""

IMPORTED = "imported file"
COMMAND: dict[str, object] = {"dpt.num_matching_queries": MATCHING_QUERIES, "dpt.num_heads": 8}
DRAWING: dict[str, object] = {
    "sample.sampler": "ddim", "sample.spacing": "leading", "sample.steps": 50, "sample.guidance": 7.5,
}  # fmt: skip
"""How txt2img.py draws."""

SIZES = {
    "query_embed.weight": 2, "transformer.encoder.layers.0.linear1.weight": 2, "input_proj.weight": 4,
    "map_to_clip.2.weight": 2, "contrastive_align_projection_text.weight": 2,
}  # fmt: skip
"""Tensors that tell sizes -> their dimensions."""
_SIDES = {"down": LORA_A, "up": LORA_B}
LORA = "unet"
"""Group of the LoRA in an adapter."""


def read_release(path: Path, model: str) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What an official checkpoint holds, as the content of an adapter.

    Args:
        path: pytorch_model.bin or a file like it, also .safetensors; or the folder that holds it. model: base
        model that it was trained on.
    Raises:
        UserError: nothing of the kind there, several of the kind, parts that are missing, or tensors for
        another model.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UserError(
            f"released files of DPT are for Stable Diffusion 1.x and 2.x, and {model} is of the family "
            f"{family}; name their base model with --model"
        )
    file = released_file(path, FILES, SUFFIXES) if path.is_dir() else path
    unet = outline(model, "unet")
    state = read_state(file)
    groups = by_group(state)
    values, official = _shapes(groups[DISCRIMINATOR], file), dict(COMMAND | DRAWING)
    official["dpt.feature"] = _feature(groups[DISCRIMINATOR], unet, file, model)
    phrase_width = groups[DISCRIMINATOR]["contrastive_align_projection_text.weight"].shape[1]
    values |= {"dpt.phrase_encoder": TINY_PHRASES} if registry.is_embedded(model) else {}
    official |= {} if registry.is_embedded(model) else {"dpt.phrase_encoder": _reader(phrase_width, file)}
    if LORA in groups:
        values["dpt.lora_rank"] = next(len(x) for key, x in groups[LORA].items() if key.endswith(LORA_A))
    values["dpt.stage"] = "tune" if LORA in groups else "probe"
    resolved = config.resolve("dpt", preset=config.NO_PRESET, flags=values | official)
    _check(groups, cast("DPTConfig", resolved.method_config), unet, phrase_width, f"{file} and {model}")
    known = dict.fromkeys(official, OFFICIAL) | dict.fromkeys(values, IMPORTED)
    held, sections = resolved.to_dict(), ("dpt", "sample")
    info = AdapterInfo(
        method="dpt",
        stage=str(values["dpt.stage"]),
        model_id=model_id(model),
        family=family,
        step=checkpoint_step(file.parent) or 0,
        source=f"official release, imported from {file.name}",
        config={"method": "dpt"} | {section: held[section] for section in sections},
        origin={
            key: known.get(key, NOT_RECORDED) for key in resolved.origin if key.partition(".")[0] in sections
        },
    )
    return info, state


# ---------------------------------------------------------------- keys


def own_key(key: str) -> str | None:
    """Key of an adapter for one of the file; None for what neither the discriminator nor LoRA has."""
    if (found := attention_lora_key(key)) is not None:
        return f"{LORA}.{found}"
    return f"{DISCRIMINATOR}.{key}" if key.partition(".")[0] in (*PARTS, FUSION, POSITIONS) else None


def official_key(key: str) -> str:
    """Key of the file for one of an adapter. Inverse of `own_key`."""
    group, _, rest = key.partition(".")
    if group != LORA:
        return rest
    side = next(side for side, end in _SIDES.items() if rest.endswith(end))
    owner, _, kind = rest.removesuffix(_SIDES[side]).removesuffix(".0").rpartition(".")
    return f"{LORA}.{owner}.processor.{kind}_lora.{side}.weight"


def official_state(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds, from the tensors of an adapter. Inverse of `read_state`."""
    return {official_key(key): x.detach().cpu().to(dtype).contiguous() for key, x in state.items()}


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a file as an adapter holds them, float32.

    Raises:
        UserError: it cannot be read safely, holds no discriminator or something besides, or values that are
        no finite numbers.
    """
    content: Any = load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file, ())
    if not isinstance(content, Mapping) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{file} holds no tensors by name, as the official code of DPT saves them")
    parts = {str(key).partition(".")[0] for key in content}
    if lacking := [part for part in PARTS if part not in parts]:
        held = ", ".join(sorted(map(str, content))[:3]) or "nothing"
        raise UserError(
            f"{file} is no checkpoint of DPT: of its discriminator it lacks {', '.join(lacking[:3])}"
            f"{' and more' if len(lacking) > 3 else ''} (it holds {held}, ...)"
        )
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        own = own_key(str(key))
        if own is None:
            raise UserError(
                f"{file} holds {key}, which is neither of the discriminator nor LoRA of attention"
            )
        if not torch.is_floating_point(value) or not torch.isfinite(value).all():
            raise UserError(f"{file}: {key} holds values that are no finite numbers")
        state[own] = value.detach().float().contiguous()
    return state


# ---------------------------------------------------------------- what the shapes tell


def _shapes(state: Mapping[str, Tensor], file: Path) -> dict[str, object]:
    """Settings of the discriminator that its tensors tell."""
    found = {key: list(state[key].shape) for key in SIZES if key in state}
    for key, dims in SIZES.items():
        if len(found.get(key, ())) != dims:
            raise UserError(f"{file}: {key} is {found.get(key, 'missing')}, expected {dims} dimensions")
    queries, width = found["query_embed.weight"]
    if queries <= MATCHING_QUERIES:
        raise UserError(
            f"{file} has {queries} queries; the first {MATCHING_QUERIES} are for matching, and some must be "
            "left for boxes"
        )
    return {
        "dpt.hidden_dim": width,
        "dpt.feedforward_dim": found["transformer.encoder.layers.0.linear1.weight"][0],
        "dpt.num_encoder_layers": _layers(state, "encoder"),
        "dpt.num_decoder_layers": _layers(state, "decoder"),
        "dpt.num_grounding_queries": queries - MATCHING_QUERIES,
        "dpt.phrase_dim": found["contrastive_align_projection_text.weight"][0],
        "dpt.pre_norm": "transformer.encoder.norm.weight" in state,
        "dpt.position": "learned" if any(key.startswith(f"{POSITIONS}.") for key in state) else "sine",
    }


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    """Layers of the encoder or of the decoder."""
    return len({key.split(".")[3] for key in state if key.startswith(f"transformer.{part}.layers.")})


def _feature(state: Mapping[str, Tensor], unet: nn.Module, file: Path, model: str) -> str:
    """The feature of the UNet that has as many channels: up1 if it has, else the only one that has."""
    if any(key.startswith(f"{FUSION}.") for key in state):
        raise UserError(
            f"{file} was made with --unet_feature all-C-S, whose S it does not tell; features of one block, "
            f"{', '.join(CONCATENATED)} can be imported"
        )
    wanted, widths, own = state["input_proj.weight"].shape[1], block_channels(unet), own_feature(unet)
    joined = [name for name in CONCATENATED if widths.keys() >= set(feature_names(name))]
    fitting = [
        name for name in (*widths, *joined) if sum(widths[block] for block in feature_names(name)) == wanted
    ]
    if own in fitting:
        return own
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{file} was made with a feature of {wanted} channels, which could be {' or '.join(fitting)} of "
            f"{model}: the file does not tell, and only {own} or a feature that alone has "
            "its number of channels can be imported"
        )
    raise UserError(
        f"{file} was made with a feature of {wanted} channels, which no block of the UNet of {model} has; "
        "name its base model with --model"
    )


def _reader(width: int, file: Path) -> str:
    """The official reader of phrases with states of this width."""
    if width not in PHRASE_ENCODERS:
        known = ", ".join(f"{name} ({n})" for n, name in PHRASE_ENCODERS.items())
        raise UserError(f"{file} reads phrases of width {width}; the official code has {known}")
    return PHRASE_ENCODERS[width]


def _check(
    groups: Mapping[str, Mapping[str, Tensor]], c: DPTConfig, unet: Any, phrase_width: int, what: str
) -> None:
    """UserError for tensors that the discriminator or the UNet's LoRA does not have, or lacks. what: the file
    and the model, for messages.
    """
    text_dim, widths = unet.config.cross_attention_dim, block_channels(unet)
    with torch.device("meta"):
        module = Discriminator(
            c,
            channels=[widths[name] for name in feature_names(c.feature)],
            text_dim=text_dim,
            phrase_width=phrase_width,
        )
    expected: dict[str, dict[str, list[int]]] = {
        DISCRIMINATOR: {name: list(p.shape) for name, p in module.named_parameters()}
    }
    if LORA in groups:
        expected[LORA] = {}
        for name, layer in lora_layers(unet, UNET_ATTENTION).items():
            o, i = layer.weight.shape
            expected[LORA] |= {name + LORA_A: [c.lora_rank, i], name + LORA_B: [o, c.lora_rank]}
    matched = groups[DISCRIMINATOR]["map_to_clip.2.weight"].shape[0]
    if matched != text_dim:
        raise UserError(
            f"{what} do not fit: the discriminator compares with text of width {matched}, and the model's "
            f"has {text_dim}; name its base model with --model"
        )
    for group, shapes in expected.items():
        try:
            check_state(shapes, groups[group])
        except ValueError as error:
            name = "discriminator" if group == DISCRIMINATOR else "LoRA"
            raise UserError(
                f"{what} do not fit: {name}: {error}; name its base model with --model"
            ) from error
