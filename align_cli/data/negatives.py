"""COCO captions with their hard negatives, as DPT's data come: a folder with a file per caption, or a table.

Every record says `title`, a caption, `neg_caption` and `neg_image`: a text that holds a Python list of other
captions, and of file names of other pictures, that are near to it (20 and 4, by OpenCLIP ViT-H-14).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from align_cli.data.prompts import no_prompt, parse_json, whole_text
from align_cli.data.records import RecordFile
from align_cli.errors import UserError

KEYS = ("title", "neg_caption", "neg_image")
NAMES = "imgname2txtid.json"


@dataclass(frozen=True)
class Record:
    """A caption, and what is hard to tell from it, unread. where: how errors name it."""

    where: str
    caption: str
    neg_caption: Any
    neg_image: Any

    def captions(self) -> list[str]:
        """Captions that are almost this one, and not this one. UserError for no list, or none in it."""
        return self._others("neg_caption", self.neg_caption, self.caption)

    def files(self, own: str) -> list[str]:
        """Pictures that the caption almost fits, without its `own`. UserError for no list, or none in it."""
        return self._others("neg_image", self.neg_image, own)

    def _others(self, key: str, raw: Any, own: str) -> list[str]:
        try:
            found = ast.literal_eval(raw) if isinstance(raw, str) else raw
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(x, str) and x.strip() for x in found):
            raise UserError(f"{self.where}: {key} must hold a list of texts, got {raw!r}"[:300])
        others = [whole_text(x, self.where) for x in found if x != own]
        if not others:
            raise UserError(f"{self.where}: {key} names nothing but the caption's own; it needs a negative")
        return others


class Negatives(Protocol):
    """Captions by number, read one at a time."""

    files: dict[str, list[int]]
    """File name of a picture -> numbers of its captions."""
    numbers: list[int]
    """Of all captions."""
    content: str
    """sha256 of what they are listed in."""

    def record(self, number: int) -> Record:
        """Caption `number`. UserError if it cannot be read or is wrong."""
        ...


def open_negatives(place: Path) -> Negatives:
    """The captions of a folder or of a .tsv file.

    Raises:
        UserError: there is neither, or it is none of hard negatives.
    """
    if place.is_dir():
        return FolderNegatives(place)
    if place.is_file():
        return TableNegatives(str(place))
    raise UserError(
        f"no hard negatives {place}; unpack those of DPT's training data there, or name a folder or a .tsv "
        "file in training with --set data.negatives=PATH"
    )


class FolderNegatives:
    """`imgname2txtid.json`, and a file 00000.json for each caption, which is read when it is wanted: there
    are half a million of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / NAMES
        raw = _read(path, f"a folder of hard negatives has {NAMES} and a file 00000.json per caption")
        names = parse_json(raw.decode(errors="replace"), str(path))
        fits = isinstance(names, dict) and all(
            isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids)
            for ids in names.values()
        )
        if not fits:
            raise UserError(f'{path} is no list of captions; it should say {{"a.jpg": [0, 1], ...}}')
        self.files: dict[str, list[int]] = {name: ids for name, ids in names.items() if ids}
        self.numbers = sorted({i for ids in self.files.values() for i in ids})
        self.content = sha256(raw).hexdigest()

    def record(self, number: int) -> Record:
        path = self.folder / f"{number:05d}.json"
        raw = _read(path, f"{NAMES} beside it names that caption").decode(errors="replace")
        return _record(parse_json(raw, str(path)), str(path))


class TableNegatives(RecordFile):
    """A table with tabs and the columns filepath (the picture), title, neg_caption and neg_image. Only the
    places of its rows are kept in memory: see `RecordFile`.
    """

    kind = "hard negative"
    formats = (".tsv",)
    quoted = (".tsv",)  # as pandas writes them
    wanted = "hard negatives stand in a folder or in a file that ends in .tsv"

    def __init__(self, path: str) -> None:
        self.files: dict[str, list[int]] = {}
        self.numbers: list[int] = []
        self.places: list[int] = []
        self.looking = True
        super().__init__(path)
        self.looking = False

    def take_header(self, names: list[str], where: str) -> None:
        for key in ("filepath", *KEYS):
            if names.count(key) != 1:
                raise no_prompt(where, names, key)
        self.places = [names.index(key) for key in ("filepath", *KEYS)]

    def parse(self, record: Any, where: str) -> Record:
        file, *cells = (record[place] for place in self.places)
        if self.looking:
            if not file.strip():
                raise UserError(f"{where}: filepath is empty")
            self.files.setdefault(file, []).append(len(self.numbers))
            self.numbers.append(len(self.numbers))
        return _record(dict(zip(KEYS, cells, strict=True)), where)


def _record(raw: Any, where: str) -> Record:
    if not isinstance(raw, dict) or any(key not in raw for key in KEYS):
        raise UserError(f"{where}: a hard negative has {', '.join(KEYS)}, this has {_keys(raw)}"[:300])
    if not isinstance(raw["title"], str) or not raw["title"].strip():
        raise UserError(f"{where}: title must be a caption, got {raw['title']!r}"[:300])
    return Record(where, whole_text(raw["title"], where), raw["neg_caption"], raw["neg_image"])


def _keys(raw: Any) -> str:
    return ", ".join(map(str, raw)) or "nothing" if isinstance(raw, dict) else "no keys"


def _read(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file {path}; {advice}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
