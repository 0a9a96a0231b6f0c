"""Checkpoints that are there completely or not at all.

A checkpoint is a folder `step-00000500` with `state.pt` (plain tensors and containers, read with
weights_only=True) and `meta.json` (format, step, size and sha256 of state.pt). It is written beside its
final place, flushed to the disk and renamed, so that a crash at any moment leaves the previous one as it
was; a damaged one is found out by its sha256.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from align_cli.errors import UserError
from align_cli.files import file_errors, sync_folder, write_text

FORMAT = 1
STATE, META = "state.pt", "meta.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d+\.(part|old)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    step: int
    path: Path
    state: dict[str, Any]


class _HashingFile:
    """The little that torch.save needs of a file, the sha256 of what went through, and what went wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha, self.size = file, sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write checkpoint `step` below `folder`, then remove all but the newest `keep`.

    Args:
        state: nested dicts and lists of tensors, numbers, texts and None.
    Raises:
        UserError: the disk is full, no permission, ... The checkpoints that were there still are.
    """
    newest = newest_name(folder)
    kept = f"the last good checkpoint is {folder / newest}" if newest else "there is no earlier checkpoint"
    with file_errors(
        f"cannot write checkpoint {path_of(folder, step)}", f"{kept}; make room, then go on with --resume"
    ):
        final = write_step(folder, step, state)
    clean(folder, keep)
    return final


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def write_step(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write checkpoint `step` below `folder`, whole or not at all. Raises OSError."""
    final = path_of(folder, step)
    part = folder / f".{final.name}.part"
    try:
        _write(part, step, state)
        if final.exists():  # left by a run that was damaged at this very step
            old = folder / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        part.rename(final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _write(part: Path, step: int, state: dict[str, Any]) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (part / STATE).open("wb") as file:
        sink = _HashingFile(file)
        try:
            torch.save(state, sink)  # type: ignore[arg-type]  # needs write and flush only
        except RuntimeError:
            if sink.error is not None:  # torch's zip writer hides it behind an error of its own
                raise sink.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    meta = {"format": FORMAT, "step": step, "bytes": sink.size, "sha256": sink.sha.hexdigest()}
    write_text(part / META, json.dumps(meta, indent=2) + "\n")
    sync_folder(part)


def names(folder: Path) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda name: int(name[5:])
    )


def steps_in(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, the earliest first."""
    return [int(name[5:]) for name in names(folder)]


def newest_name(folder: Path) -> str:
    """Name of the newest finished checkpoint, "" if there is none."""
    return next(reversed(names(folder)), "")


def clean(folder: Path, keep: int, *, upto: int | None = None) -> None:
    """Remove what a crash left unfinished, and all but the newest `keep` checkpoints. upto: the step that a
    run goes on from; later ones, which are damaged, count no more and go.
    """
    steps = [step for step in steps_in(folder) if upto is None or step <= upto]
    keep_only(folder, steps[-keep:])


def keep_only(folder: Path, steps: Collection[int]) -> None:
    """Remove what a crash left unfinished, and the checkpoints of all other steps."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for step in set(steps_in(folder)) - set(steps):
        old = folder / f".{path_of(folder, step).name}.old"
        path_of(folder, step).rename(old)
        shutil.rmtree(old, ignore_errors=True)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one line for every newer one that is not.

    Raises:
        UserError: the newest one was written by a later version of t2ialign.
    """
    damaged: list[str] = []
    for name in reversed(names(folder)):
        try:
            return read_step(folder / name), damaged
        except DamagedError as error:
            damaged.append(f"checkpoint {folder / name} is damaged ({error}) and was passed over")
    return None, damaged


class DamagedError(Exception):
    """A checkpoint that is not whole; the message says why."""


def read_step(path: Path) -> Checkpoint:
    """The checkpoint in `path`.

    Raises:
        DamagedError: it is not whole. UserError: a later version of t2ialign wrote it.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        fmt, step, size, digest = (meta[key] for key in ("format", "step", "bytes", "sha256"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"no readable {META}") from error
    if fmt > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {fmt}, this t2ialign reads up to {FORMAT}; update t2ialign"
        )
    try:
        with (path / STATE).open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedError(f"{STATE} has {found} bytes, not {size}")
            sha = sha256()
            while block := file.read(1 << 20):
                sha.update(block)
            if sha.hexdigest() != digest:
                raise DamagedError(f"{STATE} has another sha256")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, UnpicklingError) as error:
        raise DamagedError(f"{STATE} cannot be read: {error}") from error
    return Checkpoint(int(step), path, state)
