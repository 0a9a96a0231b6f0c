"""Files that are there completely or not at all, and what is said when a disk refuses. No torch."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EDQUOT, ENOSPC
from pathlib import Path

from align_cli.errors import UserError

LOCK = ".t2ialign.lock"
"""In a folder that only one command at a time may write to."""
PRIVATE = 0o600
"""The mode of temporary files, and of those that safetensors writes."""


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
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush, rename. Raises OSError; then the old file is as it was."""
    part = part_path(path)
    try:
        with part.open("wb") as file:
            file.write(content)
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
            clear_stale(folder)
            part.mkdir()
        yield part
        with file_errors(f"cannot write {folder}"):
            open_modes(part)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_modes(folder: Path) -> None:
    """Files below `folder` that only their owner may read get the mode that every new file has."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 == PRIVATE:
            path.chmod(0o666 & ~umask)


def clear_stale(path: Path) -> None:
    """Remove what processes that are gone left beside `path`: .NAME.new-PID and .NAME.old-PID."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        found = re.fullmatch(r"(?:new|old)-(\d+)", left.name.removeprefix(f".{path.name}."))
        if found and not _alive(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def clear_parts(folder: Path) -> None:
    """Remove the temporary files below `folder` that a killed process left. Raises OSError."""
    for part in folder.rglob(".*.part"):
        if part.is_file():
            part.unlink()


@contextmanager
def only_writer(folder: Path, *, main: bool = True) -> Iterator[None]:
    """Inside, no other command of this kind writes to `folder`.

    A record lock of the operating system on a file in the folder, which goes with its process, after kill -9
    too. A folder that is made for it and stays empty is removed again.

    Args:
        main: False for the other processes of the same run.
    Raises:
        UserError: another process is at work there, or the folder cannot be written to.
    """
    if not main or blocking(folder) is not None:  # a file in its place: whoever wants to write says so
        yield
        return
    made = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    with file_errors(f"cannot write to {folder}", "choose another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # a file that stays locks nobody out
            (folder / LOCK).unlink()
        os.close(handle)
        with suppress(OSError):  # not empty
            for p in made:
                p.rmdir()


def _locked(folder: Path) -> int:
    """The open lock file of a folder. OSError if there can be none, UserError if another process has it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (EACCES, EAGAIN):
            who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "its number is not known"
            os.close(handle)
            raise UserError(
                f"another t2ialign is writing to {folder} ({who}); wait until it is done, or choose another "
                "folder with --out"
            ) from None
        warnings.warn(
            f"the disk of {folder} knows no locks ({error.strerror}): see to it that no other command writes "
            "there",
            stacklevel=2,
        )
        return handle
    if not _is_there(handle, folder / LOCK):  # its last owner removed it just now
        os.close(handle)
        return _locked(folder)
    with suppress(OSError):  # on a full disk the lock holds without these words
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
