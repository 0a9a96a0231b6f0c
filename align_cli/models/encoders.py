"""Text encoders beside a denoiser that does not know them: where their files are, and that they are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align_cli.errors import UserError
from align_cli.models.loading import WITHOUT_WEIGHTS, load_tokenizer, load_weights, quiet
from align_cli.models.sources import (
    TRANSFORMERS_STEM,
    Source,
    find_module,
    read_json,
    weight_file,
    with_tokenizer,
)


@dataclass(frozen=True)
class EncoderKind:
    """What is looked for. title: its name in errors. model_type: of its config.json. part, words: its folder
    and its tokenizer's in a pipeline of diffusers. words_files: sets of files, any of which makes a
    tokenizer. how: what tells the user where to get one.
    """

    title: str
    model_type: str
    encoder: Any
    tokenizer: Any
    part: str
    words: str
    words_files: tuple[frozenset[str], ...]
    how: str


def load_encoder(
    kind: EncoderKind, source: str, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Tokenizer and frozen encoder.

    Args:
        source: hub id, folder (of transformers, or a pipeline of diffusers that has the part), or "embedded:"
            and a folder of the package.
    Raises:
        UserError: there is none, or it is damaged; says how to get one.
    """
    if WITHOUT_WEIGHTS.get():
        from align_cli.models.empty import empty_encoder

        return empty_encoder(kind, source, dtype)
    what, how = kind.title, kind.how
    found, prefix, weight = find_weights(what, kind.model_type, kind.part, source, dtype=dtype, how=how)
    words = f"{kind.words}/" if prefix else ""
    found = with_tokenizer(found, words)
    if not any(all(f"{words}{file}" in found.files for file in files) for files in kind.words_files):
        wanted = ", or ".join(" and ".join(sorted(files)) for files in kind.words_files)
        raise UserError(f"no tokenizer of {what} in {found.folder / words}: {wanted} is missing; {how}")
    with quiet():
        tokenizer = load_tokenizer(kind.tokenizer, found, kind.words if prefix else "")
        encoder = load_weights(kind.encoder, found.folder / prefix, weight, dtype, f"{what} {source}")
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


def find_weights(
    what: str, model_type: str, part: str, source: str, *, dtype: torch.dtype, how: str
) -> tuple[Source, str, str]:
    """Where a transformers model is: its source, the folder of the module in it ("" or "part/"), and the name
    of its weight file there.

    Args:
        what: its name in errors. model_type: of its config.json. part: its folder in a pipeline of diffusers.
        source: as in `load_encoder`. how: what tells the user where to get one.
    Raises:
        UserError: there is none.
    """
    if "/" not in source and not source.startswith("embedded:") and not Path(source).expanduser().is_dir():
        raise UserError(f"no {what} {source!r}: there is no such folder; {how}")
    half = dtype != torch.float32
    try:
        found, prefix = find_module(source, part, half=half, advice=how)
    except UserError as error:
        raise UserError(str(error) if how in str(error) else f"no {what}: {error}; {how}") from error
    weight = weight_file(found, prefix, TRANSFORMERS_STEM, half=half)
    described = f"{prefix}config.json" in found.files
    if weight is None or not described:
        lacking = f"{TRANSFORMERS_STEM}.safetensors (or .bin)" if described else "config.json"
        raise UserError(f"no {what} in {source}: no {prefix}{lacking} in {found.folder}; {how}")
    held = read_json(found.folder / prefix / "config.json", source).get("model_type")
    if held != model_type:
        raise UserError(f"{source} is no {what}: its model_type is {held!r}; {how}")
    return found, prefix, weight.rpartition("/")[2]
