"""What is in the files of a scorer: configurations, named tensors, tokenizers."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from align_cli.errors import UserError, first_line
from align_cli.rewards.places import Place, option

CLIP_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "merges.txt",
)  # fmt: skip


def read_json(path: Path, reward: str) -> dict[str, Any]:
    """A JSON object. UserError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{reward}: {path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{reward}: {path} is not a JSON object")
    return content


def read_tensors(path: Path, reward: str, home: Place | None = None) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, of a pickle (tensors only; inside "state_dict", "model" or
    "module" if there is one of them), or of all shards that an index.json lists (looked for in `home`).

    Raises:
        UserError: damaged, no dictionary of tensors, objects that a pickle should not hold, a missing shard.
    """
    if path.suffix == ".json":
        shards = sorted(set(read_json(path, reward).get("weight_map", {}).values()))
        beside = replace(home, file=None) if home else Place(reward, str(path.parent), folder=path.parent)
        return {k: x for s in shards for k, x in read_tensors(beside.weights([s]), reward).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{reward}: {path} holds more than tensors, or is damaged; only weights are read, no objects"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{reward}: {path} cannot be read: {first_line(error)}") from error
    for wrapping in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{reward}: {path} is no dictionary of named tensors")
    return {k.removeprefix("module."): x for k, x in content.items()}


def fill(
    module: nn.Module,
    state: dict[str, Tensor],
    where: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spare: Collection[str] = (),
) -> None:
    """Give a module, built on the meta device, its weights: all of them and no others. Freezes it.

    spare: beginnings of keys that the file may hold and the module does not need.
    Raises:
        UserError: about `where`: missing or unknown keys, or other shapes.
    """
    wanted = {k: tuple(x.shape) for k, x in module.state_dict().items()}
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted and not k.startswith(tuple(spare))]
    if missing or unknown:
        parts = [
            f"{len(keys)} weights are {word}, first {keys[0]}"
            for keys, word in ((missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise UserError(f"{where} does not fit: {'; '.join(parts)}")
    for key, shape in wanted.items():
        if tuple(state[key].shape) != shape:
            raise UserError(
                f"{where} does not fit: {key} is {list(state[key].shape)}, wanted is {list(shape)}"
            )
    module.load_state_dict({k: state[k].to(device, dtype, copy=True) for k in wanted}, assign=True)
    for part, name, length in _positions(module):
        setattr(part, name, torch.arange(length, device=device).expand(1, -1))
    module.eval().requires_grad_(False)


def _positions(module: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """The counting buffers that no file holds: (owner, name, length)."""
    for part in module.modules():
        for name, x in part.named_buffers(recurse=False):
            if name == "position_ids":
                yield part, name, x.shape[-1]


def tokenizer_of(cls: Any, own: Place, others: Sequence[str], files: Sequence[str]) -> Any:
    """A tokenizer from beside the weights (or their folder "tokenizer"), else from the first of `others`
    (hub ids, with a folder after a colon if need be) that is cached or can be fetched.

    Raises:
        UserError: none is there; names the files and the option.
    """
    places = [(own, ""), (own, "tokenizer/")]
    for name in others:
        repo, _, folder = name.partition(":")
        places.append((Place(own.reward, repo, repo=repo), folder and f"{folder}/"))
    for at, folder in places:
        there = {name: path for name in files if (path := at.find(folder + name)) is not None}
        if "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= set(there):
            return _load_tokenizer(cls, next(iter(there.values())).parent, own.reward)
    repos = ", ".join(name.partition(":")[0] for name in others)
    raise UserError(
        f"{own.reward}: no tokenizer (tokenizer.json, or vocab.json and merges.txt) beside the weights in "
        f"{own.label}, and none of {repos} in the local cache; put these files beside the weights and pass "
        f"the folder with {option(own.reward)}"
    )


def _load_tokenizer(cls: Any, folder: Path, reward: str) -> Any:
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{reward}: the tokenizer in {folder} cannot be loaded: {first_line(error)}"
        ) from error
