"""The official TextCraftor checkpoints, read and written: tc_text*.pth and tc_unet*.pth.

An official file is the state of a module behind DistributedDataParallel: every key begins with `module.`, and
those of the text encoder go on with `text_model.`, a level that transformers 5.6 took out of CLIPTextModel.
The official loader (strict=False) would silently take nothing of it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cli import config
from align_cli.adapters import NOT_RECORDED, OFFICIAL, AdapterInfo, load_pickle, load_safetensors
from align_cli.errors import UserError
from align_cli.models.loading import model_id
from align_cli.models.parts import LEVEL, family_of, outline
from align_cli.models.states import check_state

WRAPPER = "module."
"""Prefix of the official keys: of DistributedDataParallel."""
NO_WEIGHT = "embeddings.position_ids"
"""In files that old versions of transformers wrote: 0 to 76, not trained."""
FILES = {"text_encoder": "tc_text.pth", "unet": "tc_unet.pth"}
"""Part of the pipeline -> the official name of the newest file of it."""
SIGNS = {"text_encoder": ("embeddings.", "encoder.layers."), "unet": ("conv_in.", "down_blocks.")}
"""Part -> what keys begin with that only it has."""
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
FAMILIES = ("sd15", "sd21", "sdxl")
"""Families with a CLIPTextModel; of SDXL it is the first encoder."""

IMPORTED = "imported file"
COMMAND: dict[str, object] = {
    "textcraftor.rewards": {"clip-g14": 50.0, "aesthetic": 3.0, "pickscore": 1.0, "hpsv2": 100.0},
    "textcraftor.pickscore_pairing": "batch",
    "textcraftor.steps": 25,
    "textcraftor.guidance": 7.5,
    "textcraftor.spacing": "lead",
    "textcraftor.grad_steps": 5,
    "textcraftor.test_grad_steps": 15,
}
"""What the official run script (test script for test_grad_steps) sets, rewards with effective weights."""
DRAWING: dict[str, object] = {
    "sample.sampler": "ddim",
    "sample.spacing": "lead",
    "sample.steps": 25,
    "sample.guidance": 7.5,
    "sample.eta": 0.0,
}
"""How the official test scripts draw."""


def read_release(path: Path, model: str) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What official files hold, as the content of an adapter.

    Args:
        path: a file with a text encoder or a UNet, or a folder with one or both; which it is the keys tell.
        .pth or .safetensors. model: base model that they were trained on; of SDXL the file is its first text
        encoder.
    Raises:
        UserError: nothing of the kind there, several of a kind, or tensors for another model.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UserError(
            f"released files of TextCraftor are text encoders and UNets of Stable Diffusion 1.x, which "
            f"{model} does not have; name their base model with --model"
        )
    files = _choose(path) if path.is_dir() else _recognise(path)
    state: dict[str, Tensor] = {}
    for part, (file, found) in files.items():
        state |= {f"{part}.{key}": value for key, value in fit(found, part, model, file).items()}
    stage = "joint" if len(files) > 1 else "unet" if "unet" in files else "text"
    values: dict[str, object] = {"textcraftor.stage": stage}
    if family == "sdxl":
        values["textcraftor.encoders"] = ["text_encoder"]
    sections = {"textcraftor": COMMAND} | ({} if family == "sdxl" else {"sample": DRAWING})
    official = {key: value for part in sections.values() for key, value in part.items()}
    resolved = config.resolve("textcraftor", preset=config.NO_PRESET, flags=values | official)
    known = dict.fromkeys(official, OFFICIAL) | dict.fromkeys(values, IMPORTED)
    held = resolved.to_dict()
    info = AdapterInfo(
        method="textcraftor",
        stage=stage,
        model_id=model_id(model),
        family=family,
        source=f"official release, imported from {' and '.join(f.name for f, _ in files.values())}",
        # nothing about the model, nor about drawing with SDXL: those are for the model's preset to say
        config={"method": "textcraftor"} | {section: held[section] for section in sections},
        origin={
            key: known.get(key, NOT_RECORDED) for key in resolved.origin if key.partition(".")[0] in sections
        },
    )
    return info, state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, with the keys that it has.

    Raises:
        UserError: it cannot be read safely, or holds something else than named tensors.
    """
    if file.suffix == ".safetensors":
        return load_safetensors(file)
    content: Any = load_pickle(file, ())
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, expected tensors by name")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise UserError(f"{file} holds a {type(value).__name__} called {key!r}, expected tensors by name")
    return dict(content)


def fit(found: Mapping[str, Tensor], part: str, model: str, file: Path) -> dict[str, Tensor]:
    """Parameters of `part` of `model` as adapters hold them, float32, from the tensors of an official file.

    Both layouts of keys are read, with and without `module.` and `text_model.`.
    Raises:
        UserError: a key too many or too few, another shape, values that are no finite numbers.
    """
    live = {name: list(p.shape) for name, p in outline(model, part).named_parameters()}
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        name = _bare(key)
        if name == NO_WEIGHT:
            continue
        name = f"{LEVEL}{name}" if f"{LEVEL}{name}" in live else name
        if name in state:
            raise UserError(f"{file} holds {name} twice, with and without the prefix {WRAPPER} or {LEVEL}")
        state[name] = value
    try:
        check_state(live, state)
    except ValueError as error:
        raise UserError(
            f"{file} does not fit the {part} of {model}: {error}; name its base model with --model"
        ) from error
    for name, value in state.items():
        if not torch.is_floating_point(value) or not torch.isfinite(value).all():
            raise UserError(f"{file}: {name} holds values that are no finite numbers")
    return {name: value.detach().float().contiguous() for name, value in state.items()}


def official_state(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a part with the keys of an official file."""
    level = LEVEL if part == "text_encoder" else ""
    return {f"{WRAPPER}{level}{key.removeprefix(level)}": value for key, value in state.items()}


def _bare(key: str) -> str:
    return key.removeprefix(WRAPPER).removeprefix(LEVEL)


def _part(keys: Mapping[str, Tensor]) -> str | None:
    """text_encoder or unet, or None for something else."""
    names = [_bare(key) for key in keys]
    return next((part for part, signs in SIGNS.items() if any(n.startswith(signs) for n in names)), None)


def _recognise(file: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Part -> the file, which holds that part."""
    found = read_tensors(file)
    part = _part(found)
    if part is None:
        raise UserError(
            f"{file} is no text encoder and no UNet of TextCraftor: it holds "
            f"{', '.join(sorted(found)[:3]) or 'nothing'}, expected keys such as "
            f"{WRAPPER}{LEVEL}embeddings.token_embedding.weight or {WRAPPER}conv_in.weight"
        )
    return {part: (file, found)}


def _choose(folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Part -> its file in a folder: the one of the official name, else the only one."""
    there = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    found: dict[str, list[Path]] = {}
    for file in there:  # read one by one: a run leaves many, of gigabytes each
        part = _part(read_tensors(file))
        if part is not None:
            found.setdefault(part, []).append(file)
    if not found:
        held = f"only {', '.join(f.name for f in there[:3])}" if there else f"no file *{', *'.join(SUFFIXES)}"
        raise UserError(f"{folder} holds no text encoder and no UNet of TextCraftor ({held})")
    chosen = {}
    for part in (p for p in FILES if p in found):
        files = [f for f in found[part] if f.name == FILES[part]] or found[part]
        if len(files) > 1:
            raise UserError(
                f"{folder} holds several files of a {part}, name one: {', '.join(f.name for f in files)}"
            )
        chosen[part] = (files[0], read_tensors(files[0]))
    return chosen
