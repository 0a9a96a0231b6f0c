"""Sets of prompts that an evaluation draws, and files of prompts: TXT, CSV, TSV, JSON and JSONL. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from align_cli.data.prompts import (
    FORMATS,
    parse_json,
    parse_list,
    prompt_of,
    read_utf8,
    table_rows,
    too_many_cells,
)
from align_cli.errors import UserError
from align_cli.shapes.captions import Prompt

GROUP_COLUMNS = ("category", "challenge", "style", "task", "tag", "kind", "group")
"""Columns and keys by which results are also reported; the other ones are kept in `extra`."""
ID_COLUMN = "id"


@dataclass(frozen=True)
class PromptRow:
    """One prompt. id: unique in its set. groups: what results are grouped by, name -> value ("Category" ->
    "Animals"). extra: what else the benchmark says about the prompt.
    """

    id: str
    text: str
    groups: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


Judge = Callable[[np.ndarray, Sequence[PromptRow]], dict[str, np.ndarray]]
"""(pictures (N, H, W, 3) uint8, the N rows they were drawn for) -> metric -> (N,) in [0, 1], NaN where the
row does not ask."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark or of a file.

    source: where they came from, in words or as a path. scenes: what the rows ask for, in the shapes world.
    judge: who judges pictures of this set beside the scorers, None for nobody; headline: which of its metrics
    decides. image_size: side of the pictures in pixels that can be judged, 0 for any.
    notes: what the user should know about the file.
    """

    name: str
    source: str
    rows: tuple[PromptRow, ...]
    scenes: tuple[Prompt, ...] | None = None
    judge: Judge | None = None
    headline: str = ""
    image_size: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError(f"{self.source} holds no prompt")
        if self.scenes is not None and len(self.scenes) != len(self.rows):
            raise ValueError(f"{len(self.rows)} prompts but {len(self.scenes)} scenes")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The prompts, in order."""
        return [row.text for row in self.rows]

    @property
    def group_names(self) -> list[str]:
        """Names of the groupings, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.groups))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 over ids, texts and groups."""
        content = [[row.id, row.text, sorted(row.groups.items())] for row in self.rows]
        return sha256(json.dumps(content).encode()).hexdigest()[:16]

    def limited(self, n: int | None) -> PromptSet:
        """At most `n` of the prompts, spread evenly over the values of the first grouping, in file order.

        Every group gives as many as the others, or all that it has; inside a group they lie evenly apart.
        Without groups the whole set is one. None: all.
        """
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise UserError(f"an evaluation needs at least one prompt, got {n}")
        first = self.group_names[0] if self.group_names else ""
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(row.groups.get(first, ""), []).append(i)
        kept = sorted(i for members, k in zip(groups.values(), _shares(groups, n), strict=True)
                      for i in _apart(members, k))  # fmt: skip
        scenes = None if self.scenes is None else tuple(self.scenes[i] for i in kept)
        return replace(self, rows=tuple(self.rows[i] for i in kept), scenes=scenes)


def _shares(groups: Mapping[str, Sequence[int]], n: int) -> list[int]:
    """How many of `n` each group gives: one of each in turn as long as it has one, the first groups first."""
    shares = [0] * len(groups)
    sizes = [len(members) for members in groups.values()]
    while sum(shares) < n:
        for i, size in enumerate(sizes):
            if shares[i] < size and sum(shares) < n:
                shares[i] += 1
    return shares


def _apart(members: Sequence[int], k: int) -> list[int]:
    """`k` of the members, evenly apart: the middle ones of k equal parts."""
    return [members[(2 * j + 1) * len(members) // (2 * k)] for j in range(k)]


def read_prompts(path: Path, *, name: str = "", column: str | None = None) -> PromptSet:
    """The prompts of a file, as its name says: .txt (one per line), .csv, .tsv (quoting off), .json (a list
    of texts or objects) or .jsonl (a text or an object per line).

    A table needs a header that names the prompts' column: `column`, or one of TEXT_COLUMNS. A column of
    GROUP_COLUMNS groups the results, one called id names the rows; where there is none, or it is empty, their
    numbers from 0 do. A byte-order mark and CRLF are understood; rows without a prompt are left out;
    duplicates and blanks around a prompt of a table are kept. `notes` tells of the former two.

    Raises:
        UserError: missing, no such format, not UTF-8, no prompts, no column of prompts, a broken row.
    """
    return _prompt_set(path, name or path.stem, read_records(path), column)


def read_records(path: Path) -> list[tuple[str, Any]]:
    """(where in the file, content) of every line, row or entry of a file of FORMATS: a text, or an object as
    it stands there (of a table: header -> cell). Blank lines of tables and of JSONL are left out.

    Raises:
        UserError: as `read_prompts` does for the file as such.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: a file of prompts ends in {', '.join(FORMATS)}")
    text = read_utf8(path, f"a file of prompts ends in {', '.join(FORMATS)}")
    if suffix == ".txt":
        return [(f"line {i}", line.strip()) for i, line in _lines(text)]
    if suffix == ".jsonl":
        found = ((f"line {i}", line) for i, line in _lines(text) if line.strip())
        return [(where, parse_json(line, f"{path}, {where}")) for where, line in found]
    if suffix != ".json":
        return list(_table(text, path, quoted=suffix == ".csv"))
    return [(f"entry {i}", entry) for i, entry in enumerate(parse_list(text, path), 1)]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1))


def _table(text: str, path: Path, *, quoted: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, column -> cell) of every row. quoted: see `table_rows`."""
    lines = io.StringIO(text, newline="") if quoted else (line for _, line in _lines(text))
    with table_rows(lines, quoted=quoted, longest=len(text) + 1) as reader:
        try:
            header: list[str] = next(reader, [])
            if duplicate := next((cell for cell in header if header.count(cell) > 1), None):
                raise UserError(f"{path}: two columns are called {duplicate!r}")
            for cells in reader:
                where = f"line {reader.line_num}"
                if len(cells) > len(header):
                    raise too_many_cells(f"{path}, {where}", len(cells), len(header), quoted=quoted)
                if cells:
                    missing = [""] * (len(header) - len(cells))
                    yield where, dict(zip(header, cells + missing, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _prompt_set(path: Path, name: str, records: list[tuple[str, Any]], column: str | None) -> PromptSet:
    rows: list[PromptRow] = []
    blank = 0
    for where, record in records:
        row = _row(record, len(rows), f"{path}, {where}", column)
        if row is None:
            blank += 1
        else:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no prompt")
    ids = [row.id for row in rows]
    if twice := [own for own, count in Counter(ids).items() if count > 1]:
        double = twice[0]
        raise UserError(f"{path}: two prompts have the id {double!r}")
    notes = []
    if path.suffix.lower() not in (".txt", ".jsonl") and blank:
        notes.append(f"{path}: {blank} rows without a prompt are left out")
    if repeated := len(rows) - len({row.text for row in rows}):
        notes.append(f"{path}: {repeated} of {len(rows)} prompts repeat an earlier one; all are drawn, and "
                     "intervals count a text once")  # fmt: skip
    return PromptSet(name, str(path), tuple(rows), notes=tuple(notes))


def _row(record: Any, number: int, where: str, column: str | None) -> PromptRow | None:
    """A row of a file; None if it has no prompt."""
    text, key = prompt_of(record, where, column)
    if not text.strip():
        return None
    if key is None:
        return PromptRow(str(number), text)
    groups = {
        str(k): str(v)
        for k, v in record.items()
        if k != key and str(k).strip().lower() in GROUP_COLUMNS and v
    }
    names = {str(k).strip().lower(): k for k in record}
    own = record[names[ID_COLUMN]] if ID_COLUMN in names else None
    extra = {str(k): v for k, v in record.items() if k != key and k not in groups}
    return PromptRow(str(number if own in (None, "") else own), text, groups, extra)
