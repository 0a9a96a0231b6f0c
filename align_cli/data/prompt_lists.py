"""Lists of prompts as training data: TXT, CSV, TSV, JSONL and JSON."""

from __future__ import annotations

import json
import warnings
from hashlib import sha256
from typing import Any

import numpy as np

from align_cli.data.base import Example
from align_cli.data.prompts import FORMATS, TEXT_COLUMNS, no_prompt, prompt_key, prompt_of
from align_cli.data.records import TABLES, RecordFile
from align_cli.errors import UserError
from align_cli.settings import DataSettings


class PromptDataset(RecordFile):
    """The prompts of a file, in its order, without pictures.

    TXT: one per line, without the blanks around it. CSV (with quotes) and TSV (without): the column
    data.column, else the one that is called prompt, text, caption or captions, else the first. JSONL: a text
    or an object in each line, with one of these keys. JSON: a list of such. Empty prompts are kept; blank
    lines, and how little is kept in memory: see `RecordFile`.
    Source: TextCraftor's official data code, pandas.read_csv(keep_default_na=False) and the first column.
    """

    kind = "prompt"
    wanted = f"--data-path of the prompts dataset wants a file that ends in {', '.join(FORMATS)}"

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Look through the file `settings.path`, or through its first `settings.num_examples` prompts.

        `seed` and `pictures` have no use here: the order of the examples is the loop's.

        Raises:
            UserError: no file, no such format, no prompt, no such column; text that is not UTF-8, a row or
                line that is wrong (both with its number); or split val, which a list does not have.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        if split == "val" and settings.path:
            raise UserError("all of a list of prompts is for training")
        self.column = settings.column or None
        if self.column is not None and settings.path.lower().endswith(".txt"):
            raise UserError(
                f"data.column is {self.column!r}, but {settings.path} has no columns; leave it away"
            )
        self.place = 0
        super().__init__(settings.path, most=settings.num_examples)

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Prompt `index`; `rng` has nothing to choose. UserError if the file has changed or is gone."""
        return Example(prompt=self.record(index), id=index)

    def fingerprint(self) -> str:
        """Of the bytes of the file (up to the last prompt that is used), of their number and the column."""
        what = ["prompts-1", self.content, len(self), self.place if self.header else self.column]
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    def take_header(self, names: list[str], where: str) -> None:
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
        self.place = 0 if key is None else names.index(key)

    def parse(self, record: Any, where: str) -> str:
        if self.suffix in TABLES:
            cell: str = record[self.place]
            return cell
        return record if self.suffix == ".txt" else prompt_of(record, where, self.column)[0]
