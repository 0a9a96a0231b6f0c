"""Files of records, read one record at a time: TXT, CSV, TSV, JSONL and JSON lists of any length."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Generator, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from align_cli.data.prompts import (
    BOM,
    FORMATS,
    decoded,
    no_list,
    open_errors,
    parse_json,
    table_rows,
    too_many_cells,
)
from align_cli.errors import UserError

LONGEST = 1 << 22
"""Bytes of a line and characters of a cell or of an entry of a JSON list, at most: beyond it a line end or a
quote is missing.
"""
BLOCK = 1 << 16
"""Bytes of a JSON list that are read at once."""
TABLES = (".csv", ".tsv")


class RecordFile(ABC):
    """The records of a file, in its order.

    The file is read once from end to end, and every record of it checked. Then only their places are kept in
    memory, 8 bytes each. Lines end in LF, CRLF or CR. Blank lines are no records (in tables those of spaces
    and tabs alone, as for pandas).
    """

    wanted: ClassVar[str]
    """What --data-path should be, in words."""
    kind: ClassVar[str]
    """What the records are, in words: "prompt"."""
    formats: ClassVar[tuple[str, ...]] = FORMATS
    quoted: ClassVar[tuple[str, ...]] = (".csv",)
    """Tables whose cells may stand in quotes."""

    def __init__(self, path: str, *, most: int = 0) -> None:
        """Look through the file, or through its first `most` records.

        Raises:
            UserError: no file, no such format, no record; text that is not UTF-8, a row, line or entry that
                is wrong (with its number).
        """
        if not path:
            raise UserError(f"no list of {self.kind}s is named; {self.wanted}")
        self.path = Path(path).expanduser()
        self.suffix = self.path.suffix.lower()
        if self.suffix not in self.formats and not self.path.is_dir():
            raise UserError(f"{self.path}: the name does not tell the format; {self.wanted}")
        self.header: list[str] = []
        self._look_through(most)
        if not len(self):
            raise UserError(f"{self.path} holds no {self.kind}")

    @abstractmethod
    def take_header(self, names: list[str], where: str) -> None:
        """Look at the column names of a table, which are `header` afterwards. UserError if they are wrong."""

    @abstractmethod
    def parse(self, record: Any, where: str) -> Any:
        """What a record says: a text, the cells of a row (as many as the header has), or what JSON gives.
        UserError beginning with `where` if it is wrong.
        """

    def __len__(self) -> int:
        return len(self.ends) - 1

    def record(self, index: int) -> Any:
        """Record `index` as `parse` gives it. UserError if the file has changed or is gone.

        The file is opened at every call, so that processes and threads share no position in it.
        """
        start, end = int(self.ends[index]), int(self.ends[index + 1])
        with open_errors(self.path, "it was there when the command began"), self.path.open("rb") as file:
            if _stamp(file) != self.stamp:
                raise UserError(f"{self.path} has changed since it was looked through; start again")
            file.seek(start)
            raw = file.read(end - start)
        if self.suffix == ".json":
            text = raw.decode().lstrip(f"{WHITE},")
            return self.parse(json.loads(text), f"{self.path}, entry {index + 1}")
        lines = Lines(io.BytesIO(raw), self.path, start)
        return self._parsed(next(self._records(lines)), lines)

    # ------------------------------------------------------------ the file

    def _look_through(self, most: int) -> None:
        ends = array("q")
        with open_errors(self.path, self.wanted), self.path.open("rb") as file:
            self.stamp = _stamp(file)
            reader = (Entries if self.suffix == ".json" else Lines)(file, self.path)
            with closing(self._records(reader)) as records:
                if self.suffix in TABLES:
                    names: list[str] = next(records, [])
                    self.take_header(names, f"{self.path}, header")
                    self.header = names
                elif isinstance(reader, Entries):
                    reader.begin()
                ends.append(reader.end)
                for record in records:
                    self._parsed(record, reader)
                    ends.append(reader.end)
                    if len(ends) - 1 == most:
                        break
        self.ends, self.content = np.frombuffer(ends, np.int64), reader.digest.hexdigest()
        """(n + 1,): where the first record begins in the file, and where each ends, in bytes."""

    def _records(self, reader: Lines | Entries) -> Generator[Any]:
        """What the file holds, without its blank lines: texts, rows of cells, or what JSON gives."""
        if isinstance(reader, Entries):
            yield from reader
        elif self.suffix in TABLES:
            yield from _rows(reader, quoted=self.suffix in self.quoted, tabs=self.suffix == ".tsv")
        else:
            is_json = self.suffix == ".jsonl"
            for line in reader:
                if text := line.strip():
                    yield parse_json(text, reader.where) if is_json else text

    def _parsed(self, record: Any, reader: Lines | Entries) -> Any:
        """A record that was just read."""
        if self.suffix in TABLES:
            missing = len(self.header) - len(record)
            if missing < 0:
                quoted = self.suffix in self.quoted
                raise too_many_cells(reader.where, len(record), len(self.header), quoted=quoted)
            record = [*record, *[""] * missing]
        return self.parse(record, reader.where)


def _rows(lines: Lines, *, quoted: bool, tabs: bool) -> Iterator[list[str]]:
    with table_rows(lines, quoted=quoted, longest=LONGEST, tabs=tabs) as reader:
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
                lines.began = first
                yield cells


class Lines:
    """The lines of a file, or of a part that begins at byte `end`, counted and hashed on the way.

    number: of the last one, from 1. began: of the first one of the row that was just read, in a table. end:
    byte behind the last one. blank: it has spaces and tabs alone.
    """

    def __init__(self, file: BinaryIO, path: Path, end: int = 0) -> None:
        self.file, self.path, self.end = file, path, end
        self.number = self.began = 0
        self.digest = sha256()
        self.text = ""

    @property
    def where(self) -> str:
        """ "prompts.csv, line 7": where the last record begins, for an error message."""
        return f"{self.path}, line {self.began or self.number}"

    @property
    def blank(self) -> bool:
        return not self.text.strip(" \t\r\n")

    def __iter__(self) -> Iterator[str]:
        while raw := self.file.readline(LONGEST + 1):
            if len(raw) > LONGEST:
                where = f"{self.path}, line {self.number + 1}"
                raise UserError(f"{where}: longer than {LONGEST >> 20} MiB, so a line end is missing")
            for line in raw.splitlines(keepends=True) if b"\r" in raw else (raw,):
                self.number += 1
                text = decoded(line, self.path, self.number)
                self.text = text if self.end else text.removeprefix(BOM)
                self.digest.update(line)
                self.end += len(line)
                yield self.text


WHITE = " \t\r\n"
"""What may stand between the parts of a JSON text."""


class Entries:
    """The entries of a file with one JSON list, counted and hashed on the way; a block is read at a time.

    number: of the last one, from 1. end: byte behind it.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.end = file, path, 0
        self.number = 0
        self.digest = sha256()
        self.text = ""
        """What is read and not yet passed."""
        self.passed = b""
        """What is passed since the last entry."""
        self.rest = b""
        """The first bytes of a character that the last block cut in two."""
        self.line = 1

    @property
    def where(self) -> str:
        """ "prompts.json, entry 7": the last one, for an error message."""
        return f"{self.path}, entry {self.number}"

    def begin(self) -> None:
        """Pass the bracket that opens the list. UserError if there is none."""
        if self._next_sign() == BOM:
            self._pass(1)
        if self._next_sign() != "[":
            if not self.text:
                raise UserError(f"{self.path}: not valid JSON: it is empty")
            raise no_list(self.path)
        self._pass(1)

    def __iter__(self) -> Iterator[Any]:
        decoder = json.JSONDecoder()
        while (sign := self._next_sign()) != "]":
            if self.number:
                if sign != ",":
                    raise self._wrong("',' or ']' expected behind it" if sign else "the list does not end")
                self._pass(1)
                self._next_sign()
            self.number += 1
            yield self._entry(decoder)
        self._pass(1)
        if self._next_sign():
            raise self._wrong("the list ends behind it, and more follows")

    def _entry(self, decoder: json.JSONDecoder) -> Any:
        while True:
            try:
                entry, end = decoder.raw_decode(self.text)
                reason = ""
            except (ValueError, RecursionError) as error:
                entry, end, reason = None, len(self.text), getattr(error, "msg", type(error).__name__)
            # a number at the end of what is read may go on behind it
            if end < len(self.text) or len(self.text) > LONGEST or not self._more():
                break
        if reason:
            limit = f", or it is longer than {LONGEST >> 20} MiB" if len(self.text) > LONGEST else ""
            raise self._wrong(reason + limit)
        self._pass(end)
        self.digest.update(self.passed)
        self.passed = b""
        return entry

    def _next_sign(self) -> str:
        """The next character that is not white, which then is the first of `text`; "" at the end."""
        while True:
            self._pass(len(self.text) - len(self.text.lstrip(WHITE)))
            if self.text or not self._more():
                return self.text[:1]

    def _pass(self, characters: int) -> None:
        raw = self.text[:characters].encode()
        self.passed += raw
        self.end += len(raw)
        self.text = self.text[characters:]

    def _more(self) -> bool:
        """Read a block. False at the end of the file."""
        block = self.file.read(BLOCK)
        raw = self.rest + block
        try:
            text, used = codecs.utf_8_decode(raw, "strict", not block)
        except UnicodeDecodeError:
            text, used = decoded(raw, self.path, self.line), len(raw)  # says where
        self.line += text.count("\n")
        self.text, self.rest = self.text + text, raw[used:]
        return bool(block)

    def _wrong(self, reason: str) -> UserError:
        return UserError(f"{self.where}: not valid JSON: {reason}")


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and time of change."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns
