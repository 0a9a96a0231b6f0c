"""Lists of prompts as training data: TXT, CSV, TSV, JSONL and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from array import array
from collections.abc import Generator, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from align_cli.data.base import Example
from align_cli.data.prompts import (
    BOM,
    FORMATS,
    TEXT_COLUMNS,
    decoded,
    no_prompt,
    open_errors,
    parse_json,
    parse_list,
    prompt_key,
    prompt_of,
    read_utf8,
    table_rows,
    too_many_cells,
)
from align_cli.errors import UserError
from align_cli.settings import DataSettings

WANTED = f"--data-path of the prompts dataset wants a file that ends in {', '.join(FORMATS)}"
LONGEST = 1 << 22
"""Bytes of a line and characters of a cell, at most: beyond it a line end or a quote is missing."""


class PromptDataset:
    """The prompts of a file, in its order, without pictures.

    TXT: one per line, without the blanks around it. CSV (with quotes) and TSV (without): the column
    data.column, else the one that is called prompt, text or caption, else the first. JSONL: a text or an
    object in each line, with one of these keys. JSON: a list of such. Lines end in LF, CRLF or CR. Empty
    prompts are kept, blank lines are not (in tables those of spaces and tabs alone, as for pandas).

    The file is read once from end to end, and every record of it checked. Then only their places are kept in
    memory, 8 bytes each; of a JSON file all prompts are.
    Source: TextCraftor's official data code, pandas.read_csv(keep_default_na=False) and the first column.
    """

    def __init__(self, settings: DataSettings, *, seed: int = 0, split: str = "train") -> None:
        """Look through the file `settings.path`, or through its first `settings.num_examples` prompts.

        `seed` has no use here: the order of the examples is the loop's.

        Raises:
            UserError: no file, no such format, no prompt, no such column; text that is not UTF-8, a row or
                line that is wrong (both with its number); or split val, which a list does not have.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        if not settings.path:
            raise UserError(f"no list of prompts is named; {WANTED}")
        if split == "val":
            raise UserError("all of a list of prompts is for training")
        path = self.path = Path(settings.path).expanduser()
        self.suffix = path.suffix.lower()
        if self.suffix not in FORMATS and not path.is_dir():
            raise UserError(f"{path}: the name does not tell the format; {WANTED}")
        self.column = settings.column or None
        if self.column is not None and self.suffix == ".txt":
            raise UserError(f"data.column is {self.column!r}, but {path} has no columns; leave it away")
        self.header: list[str] = []
        self.place = 0
        self.whole: list[str] = []
        self.ends = np.zeros(1, np.int64)
        """(n + 1,): where the header ends in the file (0 without), and each prompt's record, in bytes."""
        if self.suffix == ".json":
            self._read_whole(settings.num_examples)
        else:
            self._look_through(settings.num_examples)
        if not len(self):
            raise UserError(f"{path} holds no prompt")

    def __len__(self) -> int:
        return len(self.whole) or len(self.ends) - 1

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Prompt `index`; `rng` has nothing to choose. UserError if the file has changed or is gone.

        The file is opened at every call, so that processes and threads share no position in it.
        """
        if self.whole:
            return Example(prompt=self.whole[index], id=index)
        start, end = int(self.ends[index]), int(self.ends[index + 1])
        with open_errors(self.path, "it was there when the command began"), self.path.open("rb") as file:
            if _stamp(file) != self.stamp:
                raise UserError(f"{self.path} has changed since it was looked through; start again")
            file.seek(start)
            lines = _Lines(io.BytesIO(file.read(end - start)), self.path, start)
        return Example(prompt=self._prompt(next(self._records(lines)), lines), id=index)

    def fingerprint(self) -> str:
        """Of the bytes of the file (up to the last prompt that is used), of their number and the column."""
        what = ["prompts-1", self.content, len(self), self.place if self.header else self.column]
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    # ------------------------------------------------------------ the file

    def _read_whole(self, most: int) -> None:
        text = read_utf8(self.path, WANTED)
        entries = parse_list(text, self.path)[: most or None]
        self.content = sha256(text.encode()).hexdigest()
        self.whole = [
            prompt_of(entry, f"{self.path}, entry {i}", self.column)[0] for i, entry in enumerate(entries, 1)
        ]

    def _look_through(self, most: int) -> None:
        ends = array("q")
        with open_errors(self.path, WANTED), self.path.open("rb") as file:
            self.stamp = _stamp(file)
            lines = _Lines(file, self.path)
            with closing(self._records(lines)) as records:
                if self.suffix in (".csv", ".tsv"):
                    self._take_header(next(records, []))
                ends.append(lines.end)
                for record in records:
                    self._prompt(record, lines)
                    ends.append(lines.end)
                    if len(ends) - 1 == most:
                        break
        self.ends, self.content = np.frombuffer(ends, np.int64), lines.digest.hexdigest()

    def _take_header(self, names: list[str]) -> None:
        where = f"{self.path}, header"
        key = prompt_key(names, self.column)
        if key is None and self.column is not None:
            raise no_prompt(where, names, self.column)
        if names.count(key) > 1:
            raise UserError(f"{where}: two columns are called {key!r}")
        if key is None and names:
            warnings.warn(
                f"{where}: no column {', '.join(TEXT_COLUMNS)}; the first one is taken, {names[0]!r} "
                "(data.column names another)",
                stacklevel=2,
            )
        self.header, self.place = names, 0 if key is None else names.index(key)

    def _records(self, lines: _Lines) -> Generator[Any]:
        """What the file holds, without its blank lines: texts, rows of cells, or what JSON gives."""
        if self.suffix in (".csv", ".tsv"):
            yield from _rows(lines, quoted=self.suffix == ".csv")
            return
        is_json = self.suffix == ".jsonl"
        for line in lines:
            if text := line.strip():
                yield parse_json(text, lines.where) if is_json else text

    def _prompt(self, record: Any, lines: _Lines) -> str:
        """The prompt of a record that was just read from the lines."""
        if not self.header:
            return record if isinstance(record, str) else prompt_of(record, lines.where, self.column)[0]
        if len(record) > len(self.header):
            raise too_many_cells(lines.where, len(record), len(self.header), quoted=self.suffix == ".csv")
        text: str = record[self.place] if self.place < len(record) else ""
        return text


def _rows(lines: _Lines, *, quoted: bool) -> Iterator[list[str]]:
    with table_rows(lines, quoted=quoted, longest=LONGEST) as reader:
        while True:
            first = lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                advice = "; is a quote not closed, or one inside a quoted cell not doubled?" if quoted else ""
                raise UserError(f"{lines.path}, line {first}: {error}{advice}") from None
            if cells is None:
                return
            if len(cells) > 1 or (cells and not lines.blank):
                yield cells


class _Lines:
    """The lines of a file of prompts, or of a part that begins at byte `end`, counted and hashed on the way.

    number: of the last one, from 1. end: byte behind it. blank: it has spaces and tabs alone.
    """

    def __init__(self, file: BinaryIO, path: Path, end: int = 0) -> None:
        self.file, self.path, self.end = file, path, end
        self.number = 0
        self.digest = sha256()
        self.text = ""

    @property
    def where(self) -> str:
        """ "prompts.csv, line 7": the last line, for an error message."""
        return f"{self.path}, line {self.number}"

    @property
    def blank(self) -> bool:
        return not self.text.strip(" \t\r\n")

    def __iter__(self) -> Iterator[str]:
        while raw := self.file.readline(LONGEST + 1):
            if len(raw) > LONGEST:
                self.number += 1
                limit = f"longer than {LONGEST >> 20} MiB"
                raise UserError(f"{self.where}: {limit}, so this is no list of prompts")
            for line in raw.splitlines(keepends=True) if b"\r" in raw else (raw,):
                self.number += 1
                text = decoded(line, self.path, self.number)
                self.text = text if self.end else text.removeprefix(BOM)
                self.digest.update(line)
                self.end += len(line)
                yield self.text


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and time of change."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns
