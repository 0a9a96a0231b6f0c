"""Filling a folder of encodings, shard after shard, and looking it over.

Several processes may fill one folder: each shard is claimed before it is encoded. A shard counts as finished
once it is in the manifest; whatever else lies there is written again.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli.data.cache import INDEX, LOCK, MANIFEST, Cache, Index, Shard, differences, identity
from align_cli.data.claims import Claims
from align_cli.data.encoding import Report, Rows
from align_cli.data.shards import READ_ERRORS, ShardReader, file_sha256, write_shard
from align_cli.errors import UserError
from align_cli.files import blocking, file_errors, part_path, write_text
from align_cli.launched import again

POLL = 1.0
"""Seconds between looks at what other processes have finished."""
HASHERS = 4
"""Shards that are hashed at once."""
TOLERANCE = 0.05
"""Encoding again may differ by so much of the largest number: kernels of another machine, half precision.
Another picture, caption or weight differs by far more."""
_OURS = re.compile(r"\.?(images|captions)-\d{5,}\.safetensors(\.part)?")


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, which may not be there yet, has room for."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    return shutil.disk_usage(there).free


def size_text(count: int) -> str:
    """Bytes for people, in decimal units: "549.4 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


LESS = (
    "make room, name another disk with --out, or write less: --posterior sample, --layout captions, "
    "--dtype float16, --limit N"
)


def check_room(folder: Path, needed: int, advice: str = LESS, replaced: int = 0) -> None:
    """UserError if the disk has no room for `needed` more bytes once `replaced` bytes are gone."""
    free = free_bytes(folder) + replaced
    if needed > free:
        when = " without the encodings that are to be replaced" if replaced else ""
        raise UserError(
            f"{size_text(needed)} are to be written to {folder}, but its disk has {size_text(free)} free"
            f"{when}; {advice}"
        )


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder before anything is loaded; what only several processes can know comes later.

    Raises:
        UserError: a file in its place, nothing to resume, or a folder of other things that is not to be
            written into: a file of the same name would be lost.
    """
    blocked = blocking(out)
    if blocked is not None:
        raise UserError(f"{blocked} is a file, not a folder; choose another folder with --out")
    if resume:
        Cache.read(out)
    if overwrite or not out.is_dir() or (out / MANIFEST).exists():
        return
    with file_errors(f"cannot look into {out}", "choose another folder with --out"):
        names = sorted(path.name for path in out.iterdir())
    ours = (LOCK, INDEX, part_path(Path(INDEX)).name, part_path(Path(MANIFEST)).name)
    other = next((name for name in names if name not in ours and not _OURS.fullmatch(name)), None)
    if other is not None:
        raise UserError(
            f"{out} is not empty and holds no encodings (but {other}); choose another folder with --out, or "
            "give --overwrite, which leaves files of other names alone"
        )


def resume_command(folder: Path) -> str:
    """What to type to go on."""
    return f"t2ialign encode --resume --out {shlex.quote(str(folder))}{again()}"


class Filling:
    """Context manager: this process at work on the folder of a cache, alone or among others.

    Raises on entry:
        UserError: the folder holds another cache, or an unfinished one and neither resume nor
            overwrite is given nor another process at work on it; there is no room, or no permission to write.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        index: Index,
        *,
        resume: bool = False,
        overwrite: bool = False,
        content: bool = False,
        less: str = LESS,
    ) -> None:
        """less: what the user may do where there is no room."""
        self.folder, self.index = folder, index
        self.resume, self.overwrite, self.content = resume, overwrite, content
        self.cache = Cache(folder, about, {})
        self.repaired: dict[str, str] = {}
        self.less = less
        self.others = False

    def __enter__(self) -> Filling:
        with file_errors(f"cannot write to {self.folder}", "choose another folder with --out"):
            if not self.folder.exists():  # before it is made, so that a refusal leaves nothing
                self._check_new()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.claims = Claims(self.folder / LOCK).__enter__()
            try:
                with self.claims.order():
                    self.others = not self.claims.come()
                    self._open()
            except BaseException:
                self.claims.__exit__(None, None, None)
                raise
        return self

    def __exit__(self, *error: object) -> None:
        self.claims.__exit__(None, None, None)

    def missing_bytes(self) -> int:
        """What is still to be written."""
        return sum(s.bytes for s in self.cache.plan if s.name not in self.cache.shards)

    def _open(self) -> None:
        path = self.folder / MANIFEST
        if self.overwrite and path.exists():
            if self.others:
                raise UserError(
                    f"another process is writing to {self.folder}; wait for it, or choose another --out"
                )
            old = [file for file in self.folder.iterdir() if _OURS.fullmatch(file.name)]
            self._check_new(sum(file.stat().st_size for file in old))  # a refusal leaves them
            path.unlink()  # first: without it, nothing else counts
            for file in old:
                file.unlink()
        if not path.exists():
            self._check_new()
            self._write_texts()
            return
        found = Cache.read(self.folder)
        if why := differences(found.about, identity(self.cache.about)):
            raise UserError(
                f"{self.folder} holds other encodings: they were made with {'; '.join(why)}; encodings of "
                "two settings are not mixed: give those of the folder, choose another --out, or replace them "
                "with --overwrite"
            )
        self.cache = found
        if not self.others:
            self._go_on()

    def _go_on(self) -> None:
        """Nobody else is at work: what is damaged or missing is to be written, if that was asked for."""
        self.repaired = self.cache.damaged()
        if self.content:
            self.repaired |= changed_shards(self.cache)
        for name in self.repaired:
            del self.cache.shards[name]
        state = next(iter(self.repaired.values()), None)
        try:
            _ = self.cache.index
        except UserError as error:
            state = state or str(error).partition(";")[0]
        if self.cache.complete and state is None:
            return
        if not self.resume:
            unfinished = (
                f"{self.folder} holds unfinished encodings ({len(self.cache.shards)} of "
                f"{len(self.cache.plan)} shards)"
            )
            raise UserError(f"{state or unfinished}; go on with --resume, or replace them with --overwrite")
        check_room(self.folder, self.missing_bytes(), self._advice())
        self._write_texts()

    def _check_new(self, replaced: int = 0) -> None:
        texts = self.index.to_text(), self.cache.to_text()
        needed = self.missing_bytes() + sum(len(text.encode()) for text in texts)
        check_room(self.folder, needed, self.less, replaced)

    def _write_texts(self) -> None:
        """items.json and the manifest."""
        write_text(self.folder / INDEX, self.index.to_text())
        write_text(self.folder / MANIFEST, self.cache.to_text())

    def run(self, encoder: Rows, report: Report, waiting: Callable[[int], None]) -> None:
        """Write all shards that no other process writes, and wait for those of others; a shard that its
        process gave up is taken over.

        Args:
            waiting: told once, how many shards other processes are still writing.
        Raises:
            UserError: the disk is full, a picture cannot be read, an encoder gives numbers that are not
            finite. Finished shards are kept.
        """
        told = False
        plan = self.cache.plan
        while not self.cache.complete:
            took = False
            for number, shard in enumerate(plan):
                if shard.name in self.cache.shards or not self.claims.take(number):
                    continue
                try:
                    self._refresh(report)
                    if shard.name not in self.cache.shards:
                        self._write(shard, encoder, report)
                        took = True
                finally:
                    self.claims.release(number)
            self._refresh(report)
            if not took and not self.cache.complete:
                if not told:
                    waiting(len(plan) - len(self.cache.shards))
                told = True
                time.sleep(POLL)

    def _write(self, shard: Shard, encoder: Rows, report: Report) -> None:
        path = self.folder / shard.name
        with file_errors(f"cannot write {path}", self._advice()):
            part_path(path).unlink(missing_ok=True)  # of a process that was killed
        tensors = encoder.rows(shard.kind, range(shard.start, shard.stop), report)
        with file_errors(f"cannot write {path}", self._advice()):
            written = write_shard(path, encoder.fields(shard.kind), tensors)
            assert written.bytes == shard.bytes, f"{path}: {written.bytes} bytes, planned {shard.bytes}"
            with self.claims.order():
                now = Cache.read(self.folder)
                now.shards[shard.name] = written
                write_text(self.folder / MANIFEST, now.to_text())
        self.cache.shards[shard.name] = written

    def _refresh(self, report: Report) -> None:
        """See what others have finished."""
        now = Cache.read(self.folder).shards
        for shard in self.cache.plan:
            if shard.name in now and shard.name not in self.cache.shards:
                report(shard.kind, shard.stop - shard.start)
        self.cache.shards = now

    def _advice(self) -> str:
        return (
            f"{len(self.cache.shards)} of {len(self.cache.plan)} shards are finished and kept; make room, "
            f"then go on with: {resume_command(self.folder)}"
        )


# ---------------------------------------------------------------- looking it over


def changed_shards(cache: Cache, done: Callable[[str], None] | None = None) -> dict[str, str]:
    """Finished shards of the right size whose content is not what was written, with what is wrong.

    done: told the name of every shard that was looked at.
    """
    bad = cache.damaged()
    names = [s.name for s in cache.plan if s.name in cache.shards and s.name not in bad]

    def look(name: str) -> str | None:
        path = cache.folder / name
        try:
            found = file_sha256(path)
        except OSError as error:
            return f"shard {path} cannot be read ({error.strerror})"
        return None if found == cache.shards[name].sha256 else f"shard {path} has another content (sha256)"

    problems = {}
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, problem in zip(names, pool.map(look, names), strict=True):
            if problem:
                problems[name] = problem
            if done is not None:
                done(name)
    return problems


@dataclass(frozen=True)
class Comparison:
    """Rows that were encoded once more. worst: largest difference, in units of the row's largest number;
    where: its shard.
    """

    rows: int
    identical: int
    worst: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the encodings are those of this model and these data."""
        return self.worst <= TOLERANCE


def compare(cache: Cache, encoder: Rows, count: int, skip: Sequence[str] = ()) -> Comparison:
    """Encode `count` items, evenly over the dataset, and a caption of each, and compare with what is stored.

    skip: shards that are known to be damaged.
    """
    reader = ShardReader()
    items = sorted({round(x) for x in np.linspace(0, cache.about["num_examples"] - 1, count)})
    wanted = [("images", items)]
    if cache.about["layout"] != "captions":
        wanted.append(("captions", sorted({cache.index.items[i][0] for i in items})))
    rows = identical = 0
    worst, where = 0.0, ""
    for kind, numbers in wanted:
        places = {n: cache.place(kind, n) for n in numbers}
        numbers = [n for n in numbers if places[n][0].name in cache.shards and places[n][0].name not in skip]
        again = encoder.rows(kind, numbers)
        for i, number in enumerate(numbers):
            shard, row = places[number]
            path = cache.folder / shard.name
            try:
                stored = reader.row(path, row)
            except READ_ERRORS as error:
                raise UserError(f"shard {path} cannot be read ({error})") from error
            gap = max(_gap(x, again[name][i]) for name, x in stored.items())
            rows, identical = rows + 1, identical + (gap == 0)
            if gap > worst:
                worst, where = gap, str(path)
    return Comparison(rows, identical, worst, where)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest number; exactly 0 for equal bits, infinite if `a` has
    numbers that are not finite.
    """
    if torch.equal(a, b):
        return 0.0
    if not torch.isfinite(a).all():
        return math.inf
    scale = max(float(a.abs().max()), 1e-30)
    return max(float((a.float() - b.float()).abs().max()) / scale, 1e-30)
