"""What files of prompts have in common, whoever reads them: text, tables, JSON, and which part is the prompt.

No torch.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align_cli.errors import UserError

FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
TEXT_COLUMNS = ("prompt", "text", "caption", "captions")
"""Names, in any case, of the column or key that holds the prompt; the first that is there counts. captions:
one text, in the lists of LayoutLLM-T2I (COCO-NSS1K)."""
BOM = "\ufeff"
"""Byte-order mark, which some programs put in front of UTF-8."""
WANTED = "--prompts wants a text file with one prompt per line"


# ---------------------------------------------------------------- text


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file; blank lines are skipped, blanks around a prompt are dropped.

    Raises:
        UserError: the file is missing, a folder, unreadable, not UTF-8 text (says at which line), or empty.
    """
    prompts = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one per line")
    return prompts


def read_utf8(path: Path, wanted: str = WANTED) -> str:
    """The text of a file of prompts, without a byte-order mark.

    Args:
        wanted: what should have been given, in words.
    Raises:
        UserError: the file is missing, a folder, unreadable, or not UTF-8 text (says at which line).
    """
    with open_errors(path, wanted):
        raw = path.read_bytes()
    return decoded(raw, path).removeprefix(BOM)


@contextmanager
def open_errors(path: Path, wanted: str = WANTED) -> Iterator[None]:
    """An `OSError` of reading `path` becomes a `UserError` that says what should have been given."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"no prompt file {path}; {wanted}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; {wanted}") from None
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror or error}") from None


def decoded(raw: bytes, path: Path, line: int = 1) -> str:
    """The text of a part of a file that begins with line number `line`.

    Raises:
        UserError: it is not UTF-8, or has a zero byte; names the line.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte = raw[error.start]
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise UserError(f"{path}, line {line}: a zero byte, so this is no text file; save the file as UTF-8")
    return text


# ---------------------------------------------------------------- tables and JSON


@contextmanager
def table_rows(
    lines: Iterable[str], *, quoted: bool, longest: int, tabs: bool | None = None
) -> Iterator[Any]:
    """A csv reader of the rows of a table, while the `with` block lasts.

    Args:
        quoted: cells may stand in quotes; else quotes are text, as in PartiPrompts.tsv.
        longest: characters that a cell may have; the csv module takes 131,072 by itself.
        tabs: between the cells, in place of commas; None: where there are no quotes.
    """
    delimiter = "\t" if (not quoted if tabs is None else tabs) else ","
    before = csv.field_size_limit(longest)
    try:
        if quoted:
            yield csv.reader(lines, delimiter=delimiter, strict=True)
        else:
            yield csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    finally:
        csv.field_size_limit(before)


def too_many_cells(where: str, found: int, header: int, *, quoted: bool) -> UserError:
    """What is said of a row with more cells than the header has."""
    advice = "; put a prompt with a comma in double quotes" if quoted else ""
    return UserError(f"{where}: {found} cells but the header has {header}{advice}")


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text. UserError beginning with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{where}: not valid JSON: {reason}") from None


def parse_list(text: str, path: Path) -> list[Any]:
    """The entries of a JSON file of prompts. UserError if it is no list."""
    content = parse_json(text, str(path))
    if not isinstance(content, list):
        raise no_list(path)
    return content


def no_list(path: Path) -> UserError:
    """What is said of a JSON file that is none."""
    return UserError(f'{path} is no list; write ["a red circle", ...] or [{{"prompt": "a red circle"}}, ...]')


# ---------------------------------------------------------------- which part is the prompt


def prompt_key(
    names: Collection[Any], column: str | None = None, columns: Sequence[str] = TEXT_COLUMNS
) -> Any:
    """The name of the column or key with the prompt: `column` itself, else the first of `columns`, in any
    case. None if it is not among the names.
    """
    if column is not None:
        return column if column in names else None
    lower = {str(name).strip().lower(): name for name in names}
    return next((lower[c] for c in columns if c in lower), None)


def no_prompt(
    where: str, names: Collection[Any], column: str | None = None, columns: Sequence[str] = TEXT_COLUMNS
) -> UserError:
    """What is said where `prompt_key` finds none."""
    wanted = repr(column) if column is not None else " or ".join(map(repr, columns))
    return UserError(f"{where}: no {wanted} among {', '.join(map(repr, names)) or 'no columns'}")


def prompt_of(record: Any, where: str, column: str | None = None) -> tuple[str, Any]:
    """The prompt of a record, which is a text or an object with one, and its key there (None for a text).

    Raises:
        UserError: neither of both, no such key, or no text under it; begins with `where`.
    """
    if isinstance(record, str):
        return whole_text(record, where), None
    if not isinstance(record, dict):
        raise UserError(f"{where}: neither a text nor an object with a prompt")
    key = prompt_key(record, column)
    if key is None:
        raise no_prompt(where, record, column)
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: the prompt is no text but {text!r}"[:200])
    return whole_text(text, where), key


def whole_text(text: str, where: str) -> str:
    """The text. UserError for half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the prompt holds {half[0]!a}, half of a character; write it in full")
    return text
