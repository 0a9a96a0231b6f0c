"""Files that are there completely or not at all, and what is said when a disk refuses. No torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path

from align_cli.errors import UserError


@contextmanager
def file_errors(doing: str, advice: str = "") -> Iterator[None]:
    """An `OSError` inside becomes a `UserError` that begins with `doing` and ends with `advice`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (ENOSPC, EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        tail = f"; {advice}" if advice else ""
        raise UserError(f"{doing}: {reason}{tail}") from error


def released_file(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> Path:
    """The file of released weights in a folder: the first of `names` that is there, else the only one that
    ends in one of `suffixes`.

    Raises:
        UserError: none, or several; names the folders checkpoint-N that are there.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    if len(there) == 1:
        return there[0]
    steps = sorted((step for p in folder.iterdir() if (step := checkpoint_step(p)) is not None), reverse=True)
    if there:
        held = f"several files, name one: {', '.join(f.name for f in there)}"
    elif steps:
        held = f"checkpoints, name one: {', '.join(f'checkpoint-{n}' for n in steps[:3])}"
        held += ", ..." * (len(steps) > 3)
    else:
        held = f"no {names[0]}"
    raise UserError(f"{folder} has {held}")


def checkpoint_step(folder: Path) -> int | None:
    """N of a folder that accelerate calls checkpoint-N, None for any other."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def blocking(folder: Path) -> Path | None:
    """The file that stands where `folder`, or one above it, would have to be; None if there is none."""
    return next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)


def part_path(path: Path) -> Path:
    """The temporary name of a file that is being written."""
    return path.with_name(f".{path.name}.part")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, flush, rename. Raises OSError; then the old file is as it was."""
    part = part_path(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears when the block ends, complete; after an error there is nothing of it.

    Yields the folder to write into, which has a temporary name beside the final one.
    Raises:
        UserError: it exists already, or its place cannot be written to.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder with --out")
    part = folder.parent / f".{folder.name}.new-{os.getpid()}"
    try:
        with file_errors(f"cannot write {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
        yield part
        with file_errors(f"cannot write {folder}"):
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
