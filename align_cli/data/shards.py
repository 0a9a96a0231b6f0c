"""Shards: safetensors files of many rows whose size is known before they are written.

A shard holds tensors (n, ...) of equal n, one row per item. It is there completely or not at all: written to
a temporary name, flushed to the disk and renamed. The writer is our own because safetensors' hides a full
disk in a text, and its file would have to be read again to be hashed; any safetensors library reads these.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align_cli.files import part_path, sync_folder

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of dtypes here and in safetensors."""
BLOCK = 1 << 24
"""Bytes that are written, or read to be hashed, at a time."""
OPEN_FILES = 64
"""Shards that a reader keeps open."""


@dataclass(frozen=True)
class Field:
    """One tensor of a shard. dtype: "float16", ...; shape: of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * number_bytes(self.dtype)


@dataclass(frozen=True)
class Written:
    """What a finished shard is known by."""

    rows: int
    bytes: int
    sha256: str


def header(fields: Sequence[Field], rows: int) -> bytes:
    """The beginning of a safetensors file: length, JSON, blanks up to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for field in _laid_out(fields):
        start, end = end, end + rows * field.row_bytes
        table[field.name] = {
            "dtype": DTYPES[field.dtype],
            "shape": [rows, *field.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(fields: Sequence[Field], rows: int) -> int:
    """Exact size of a shard file."""
    return len(header(fields, rows)) + rows * sum(field.row_bytes for field in fields)


def _laid_out(fields: Sequence[Field]) -> list[Field]:
    """The order in the file: wide numbers first, so that all are aligned."""
    return sorted(fields, key=lambda f: (-number_bytes(f.dtype), f.name))


def number_bytes(dtype: str) -> int:
    """Bytes of one number."""
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


def open_part(path: Path) -> BinaryIO:
    """The temporary file, new and empty."""
    return path.open("wb")


def write_shard(path: Path, fields: Sequence[Field], tensors: Mapping[str, Tensor]) -> Written:
    """Write (n, ...) CPU tensors as the shard `path`, replacing one that is there.

    Raises:
        ValueError: tensors that are not as `fields` says.
        OSError: the disk is full, ...; then the half-written file is removed and `path` is as it was.
    """
    rows = len(next(iter(tensors.values())))
    for field in fields:
        x = tensors[field.name]
        if tuple(x.shape) != (rows, *field.shape) or x.dtype != getattr(torch, field.dtype):
            raise ValueError(
                f"{field.name} should be {rows} rows of {field.shape} {field.dtype}, got {tuple(x.shape)} "
                f"{x.dtype}"
            )
    part = part_path(path)
    try:
        with open_part(part) as file:
            sha, size = sha256(), 0
            for block in _blocks(fields, rows, tensors):
                file.write(block)
                sha.update(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Written(rows, size, sha.hexdigest())


def _blocks(fields: Sequence[Field], rows: int, tensors: Mapping[str, Tensor]) -> Any:
    yield header(fields, rows)
    for field in _laid_out(fields):
        data = tensors[field.name].contiguous().view(torch.uint8).numpy().data.cast("B")
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]


def file_sha256(path: Path) -> str:
    """Hash of a file. Raises OSError."""
    sha = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()


class ShardReader:
    """Single rows of shards, mapped into memory; every process opens the files for itself."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._owner = 0

    def row(self, path: Path, row: int) -> dict[str, Tensor]:
        """Row `row` of every tensor, a copy.

        Raises:
            OSError, SafetensorError: the file is missing, or no whole safetensors file.
        """
        return {name: view[row : row + 1][0] for name, view in self._views(path).items()}

    def _views(self, path: Path) -> dict[str, Any]:
        if self._owner != os.getpid():  # a loader process: nothing open may be shared with its parent
            self._open, self._owner = OrderedDict(), os.getpid()
        if path not in self._open:
            file = safe_open(path, framework="pt")
            self._open[path] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        found: dict[str, Any] = self._open[path]
        return found

    def __reduce__(self) -> tuple[type[ShardReader], tuple[()]]:
        return ShardReader, ()


READ_ERRORS = (OSError, SafetensorError)
"""What reading a missing or damaged shard raises."""
