"""Lists of pictures with their captions, as LongAlign's data come: JSON, JSONL, CSV and TSV."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from align_cli.data.base import Example
from align_cli.data.coco import square_pixels
from align_cli.data.prompts import FORMATS, no_prompt, prompt_key, whole_text
from align_cli.data.records import TABLES, RecordFile
from align_cli.errors import UserError
from align_cli.settings import DataSettings

PICTURE_COLUMNS = ("path", "file_name", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""Names, in any case, of the columns or keys of the picture's file and of its caption; the first that is
there counts."""


class CaptionedImages(RecordFile):
    """The pictures of a list with a caption each, in its order.

    Every record names a picture (path, file_name or image; relative to data.images, else to the folder of the
    list) and a caption (data.column, else caption, text or prompt). The image is resized so that its short
    side is image_size, cropped to the central square, and scaled to [-1, 1]. Of the caption double newlines
    are taken out, with nothing put in their place, and the blanks around it. Empty captions are kept. How
    little is kept in memory: see `RecordFile`.
    Source: LongAlign's data code, with data.interpolation bilinear, and columns path and caption.
    """

    kind = "caption"
    formats = tuple(suffix for suffix in FORMATS if suffix != ".txt")
    wanted = f"--data-path of the captions dataset wants a file that ends in {', '.join(formats)}"

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Look through the list `settings.path`, or through its first `settings.num_examples` records, and
        whether the pictures are there. Without `pictures` the list need not even name them.

        `seed` has no use here: the order of the examples is the loop's.

        Raises:
            UserError: no file, no such format, no record, no picture or caption in one of them (with its
                number), missing pictures; or split val, which a list does not have.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        if split == "val" and settings.path:
            raise UserError("all of a list of captions is for training")
        self.settings, self.pictures = settings, pictures
        self.root = Path(settings.images or Path(settings.path).parent).expanduser()
        if pictures and settings.images and not self.root.is_dir():
            raise UserError(f"data.images: no folder {self.root}; name the one that the pictures lie in")
        self.ids: list[int] = []  # a record has no name but its place in the list
        self.places = (0, 0)
        self.num_missing, self.first_missing = 0, ""
        self.looking = pictures
        super().__init__(settings.path, most=settings.num_examples)
        self.looking = False
        if self.num_missing:
            raise UserError(
                f"{self.first_missing}; {self.num_missing} of the {len(self)} pictures of the list are "
                "missing: name their folder with --set data.images=FOLDER, or use fewer with --set "
                "data.num_examples=N"
            )

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; `rng` has nothing to choose. UserError if its picture cannot be read, or the list
        has changed or is gone.
        """
        path, caption = self.record(index)
        side, way = self.settings.image_size, self.settings.interpolation
        pixels = square_pixels(self.root / path, side, way) if self.pictures else None
        return Example(prompt=caption, pixels=pixels, id=index)

    def captions_of(self, index: int) -> list[str]:
        """The one caption of record `index`."""
        return [self.record(index)[1]]

    def fingerprint(self) -> str:
        """Of the bytes of the list (up to the last record that is used), of their number, the column, size
        and filter; the pixels of the files are not read for it.
        """
        s = self.settings
        what = ["captions-1", self.content, len(self), s.column, s.image_size, s.interpolation]
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    def take_header(self, names: list[str], where: str) -> None:
        if not names:
            return
        keys = [self._caption_key(names, where)]
        keys += [self._picture_key(names, where)] if self.pictures else []
        if twice := next((key for key in keys if names.count(key) > 1), None):
            raise UserError(f"{where}: two columns are called {twice!r}")
        self.places = names.index(keys[0]), names.index(keys[-1])

    def parse(self, record: Any, where: str) -> tuple[str, str]:
        """The name of the picture ("" without pictures), and the caption."""
        path: Any = ""
        if self.suffix in TABLES:
            caption, path = (record[place] for place in self.places)
        elif isinstance(record, dict):
            caption = record[self._caption_key(record, where)]
            path = record[self._picture_key(record, where)] if self.pictures else ""
        else:
            raise UserError(f'{where}: no object; write {{"path": "a.jpg", "caption": "a red circle"}}')
        if not isinstance(caption, str):
            raise UserError(f"{where}: the caption is no text but {caption!r}"[:200])
        text = whole_text(caption, where).replace("\n\n", "").strip()
        if not self.pictures:
            return "", text
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise UserError(f"{where}: the picture is no name of a file but {path!r}"[:200])
        if self.looking and not (self.root / path).is_file():
            self.num_missing += 1
            self.first_missing = self.first_missing or f"{where}: no picture {self.root / path}"
        return path, text

    def _caption_key(self, names: Any, where: str) -> Any:
        column = self.settings.column or None
        key = prompt_key(names, column, CAPTION_COLUMNS)
        if key is None:
            raise no_prompt(where, names, column, CAPTION_COLUMNS)
        return key

    def _picture_key(self, names: Any, where: str) -> Any:
        key = prompt_key(names, None, PICTURE_COLUMNS)
        if key is None:
            raise no_prompt(where, names, None, PICTURE_COLUMNS)
        return key
