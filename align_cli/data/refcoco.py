"""RefCOCO, RefCOCO+ and RefCOCOg with COCO captions and their hard negatives, laid out as DPT's data are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align_cli.data.base import Example, draw_caption
from align_cli.data.coco import FILTERS, look_for_images, read_captions, read_rgb, to_pixels
from align_cli.data.expressions import Expression, read_expressions
from align_cli.data.grounded import Grounded, relative
from align_cli.data.negatives import Negatives, Record, open_negatives
from align_cli.errors import UserError
from align_cli.settings import DataSettings

T = TypeVar("T")
LAYOUT = "a folder with coco/images, coco/annotations, ReC/mdetr/OpenSource and ITM/coco, as DPT's data have"
EXPRESSIONS = "ReC/mdetr/OpenSource/finetune_{}_{}.json"
NEGATIVES = "ITM/coco/{}_hard_neg_t20_i4OpenClip_ViT-H-14"
CAPTIONS = "coco/annotations/captions_train2014.json"
SETS = ("refcoco", "refcoco+", "refcocog")
TESTS = {"refcoco": ("testA", "testB"), "refcoco+": ("testA", "testB"), "refcocog": ("test",)}
SPLITS = ("train", "val", "test")
TRIES = 1000
"""Draws of a random negative before a dataset is said to have none."""


@dataclass(frozen=True, slots=True)
class Row:
    """Caption `number` of the negatives, with its picture: an example for matching alone."""

    file: str
    number: int


class RefCoco:
    """Expressions with boxes, whole captions, and false captions and pictures.

    train: an example per expression; the caption is one of the picture's at random, its hard negatives are
    drawn from the lists of that caption. val, test: examples for grounding alone (RefCOCO's expressions,
    with a caption from COCO) and for matching alone (rows of the held-out hard negatives), by turns and in a
    fixed random order, so that the first N are a fair sample; see `Grounded`. Pictures are resized to
    image_size x image_size; their aspect is not kept, and boxes are relative.

    Source: data/dataset/refcoco.py, coco_hard_negative.py and transforms.py of DPT's official code, with
    data.interpolation bilinear. Deviations: random captions and pictures are drawn until they are not the
    example's own (uniformly over the others), also from the last caption; a hard negative that is the
    example's own is left out; expressions without a box are left out; no cached latents.
    """

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Read the expressions and the list of the captions, and look whether the pictures are there, unless
        no `pictures` are wanted. What is false is read when it is drawn.

        `seed` has no use here: the order of the examples is the loop's.

        Raises:
            UserError: no such folder or file, records that are wrong (named), missing pictures, or nothing
                that has all it needs.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not settings.path:
            raise UserError(f"the refcoco dataset needs --data-path: {LAYOUT}")
        self.root = Path(settings.path).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data folder {self.root} does not exist; --data-path wants {LAYOUT}")
        self.settings, self.split, self.pictures = settings, split, pictures
        images = self.root / "coco" / "images"
        self.folder, self.row_folder = images / "train2014", images / "val2014"
        self.captions: dict[str, list[str]] = {}
        self.items: list[Expression | Row]
        self.negatives: Negatives = open_negatives(self._negatives_place())
        found, self.content = self._expressions()
        if split == "train":
            self.items = [*self._with(found, self.negatives.files, "hard negatives")]
        else:
            _, files, captions = read_captions(self.root / CAPTIONS)
            self.captions = dict(zip(files, captions, strict=True))
            rows = [Row(f, n) for f, numbers in self.negatives.files.items() for n in numbers]
            self.items = _by_turns(rows, self._with(found, self.captions, "captions"))
        self.items = self.items[: settings.num_examples or None]
        self.pool = [item.file for item in self.items if split == "train" or isinstance(item, Row)]
        """Where random pictures are drawn from: uniformly over the examples, as in the official code."""
        if pictures:
            for folder, kind in ((self.folder, Expression), (self.row_folder, Row)):
                if files := [item.file for item in self.items if isinstance(item, kind)]:
                    look_for_images(folder, list(dict.fromkeys(files)), LAYOUT)

    def __len__(self) -> int:
        return len(self.items)

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; `rng` draws the caption, and what is false. Without pictures `extra` is empty.

        Raises:
            UserError: a picture or a record that cannot be read or is wrong, a picture of another size than
                its record says, no negative.
        """
        item = self.items[index]
        if isinstance(item, Row):
            record = self.negatives.record(item.number)
        elif self.split != "train":
            texts = self.captions[item.file]
            return self._for_grounding(index, item, texts[draw_caption(texts, rng)])
        else:
            own = self.negatives.files[item.file]
            record = self.negatives.record(own[draw_caption(own, rng)])
        if not self.pictures:
            return Example(record.caption, id=index)
        return self._whole(index, item, record, rng)

    def fingerprint(self) -> str:
        """Of the bytes of the expressions and of the list of captions, of their number, size and filter; the
        pictures and the records of hard negatives are not read for it.
        """
        s = self.settings
        what = [
            "refcoco-1", self.split, len(self), self.content, self.negatives.content, s.image_size,
            s.interpolation,
        ]  # fmt: skip
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    # ------------------------------------------------------------ examples

    def _whole(self, index: int, item: Expression | Row, record: Record, rng: np.random.Generator) -> Example:
        """With false captions and pictures; of a row with its caption as expression, and no box."""
        folder = self.row_folder if isinstance(item, Row) else self.folder
        pixels, size = self._read(folder, item)
        hard, hard_files = record.captions(), record.files(item.file)
        hard_prompt = hard[rng.integers(len(hard))]
        hard_file = hard_files[rng.integers(len(hard_files))]
        random_prompt = self._other_caption(item.file, record.caption, rng)
        random_file = _drawn(self.pool, lambda file: file != item.file, rng, "pictures")
        text, boxes, spans = _located(item) if isinstance(item, Expression) else (record.caption, NO_BOX, [])
        grounded = Grounded(
            expression=text,
            boxes=boxes,
            spans=spans,
            hard_prompt=hard_prompt,
            random_prompt=random_prompt,
            hard_pixels=self._pixels(folder / hard_file),
            random_pixels=self._pixels(folder / random_file),
            size=size,
        )
        return Example(record.caption, pixels, index, {"grounded": grounded})

    def _for_grounding(self, index: int, item: Expression, caption: str) -> Example:
        if not self.pictures:
            return Example(caption, id=index)
        pixels, size = self._read(self.folder, item)
        text, boxes, spans = _located(item)
        none = torch.zeros_like(pixels)
        grounded = Grounded(text, boxes, spans, "", "", none, none, size)
        return Example(caption, pixels, index, {"grounded": grounded})

    def _other_caption(self, own: str, caption: str, rng: np.random.Generator) -> str:
        """Any caption of another picture."""
        mine = set(self.negatives.files[own])
        while True:
            number = _drawn(self.negatives.numbers, lambda n: n not in mine, rng, "captions")
            text = self.negatives.record(number).caption
            if text != caption:
                return text
            mine.add(number)

    def _read(self, folder: Path, item: Expression | Row) -> tuple[Tensor, tuple[int, int]]:
        """The example's own picture, and its stored (height, width)."""
        path = folder / item.file
        image = read_rgb(path)
        size = image.height, image.width
        if isinstance(item, Expression) and size != item.size:
            raise UserError(
                f"image {path} has {size[1]} x {size[0]} pixels, but the expression {item.text!r} was marked "
                f"in one of {item.size[1]} x {item.size[0]}; fetch the picture again"
            )
        return self._resized(image), size

    def _pixels(self, path: Path) -> Tensor:
        return self._resized(read_rgb(path))

    def _resized(self, image: Image.Image) -> Tensor:
        side = self.settings.image_size
        return to_pixels(image.resize((side, side), FILTERS[self.settings.interpolation]))

    # ------------------------------------------------------------ files

    def _negatives_place(self) -> Path:
        given = self.settings.negatives
        if given:
            return self._own_path("data.negatives", given)
        place = NEGATIVES.format("train" if self.split == "train" else "val")
        return self.root / (place if self.split == "train" else f"{place}.tsv")

    def _expressions(self) -> tuple[list[Expression], list[str]]:
        """All expressions of the split, and the digests of their files."""
        name = self.settings.expressions
        if name not in ("refall", *SETS):
            if Path(name).suffix.lower() != ".json":
                raise UserError(
                    f"data.expressions must be refall, {', '.join(SETS)}, or a .json file, got {name!r}"
                )
            paths = [self._own_path("data.expressions", name)]
        elif self.split == "train":
            paths = [self.root / EXPRESSIONS.format(name, "train")]
        else:
            parts = [(s, p) for s in SETS if name in ("refall", s) for p in self._parts(s)]
            paths = [self.root / EXPRESSIONS.format(*part) for part in parts]
        read = [read_expressions(path) for path in paths]
        return [e for found, _ in read for e in found], [digest for _, digest in read]

    def _parts(self, name: str) -> tuple[str, ...]:
        return ("val",) if self.split == "val" else TESTS[name]

    def _own_path(self, key: str, given: str) -> Path:
        """A path that the user named, for this split."""
        if self.split != "train" and "{split}" not in given:
            raise UserError(
                f"{key} is {given}, which is for training; write {{split}} in its path for train, val, test"
            )
        return Path(given.replace("{split}", self.split)).expanduser()

    def _with(
        self, found: list[Expression], known: Mapping[str, Sequence[object]], what: str
    ) -> list[Expression]:
        """The expressions whose picture is known; a warning counts the others. UserError if there is none."""
        there = [e for e in found if known.get(e.file)]
        if len(there) == len(found):
            return there
        first = next(e.file for e in found if not known.get(e.file))
        said = f"{len(found) - len(there)} of {len(found)} expressions have a picture without {what}"
        if not there:
            raise UserError(f"{said} (the first: {first}), so that none is left; see data.negatives")
        warnings.warn(f"{said}, and are left out (the first: {first})", stacklevel=3)
        return there


NO_BOX = torch.zeros(0, 4)


def _located(item: Expression) -> tuple[str, Tensor, list[list[tuple[int, int]]]]:
    """The expression, its boxes, and their spans, as `Grounded` has them."""
    return item.text, relative(item.boxes, item.size), [list(spans) for spans in item.spans]


def _by_turns(rows: list[Row], expressions: list[Expression]) -> list[Expression | Row]:
    """Each in a random order that is always the same, then one of each kind by turns."""
    shuffled = [
        [part[i] for i in np.random.default_rng(0).permutation(len(part))] for part in (rows, expressions)
    ]
    return [item for pair in zip_longest(*shuffled) for item in pair if item is not None]


def _drawn(pool: Sequence[T], fits: Callable[[T], bool], rng: np.random.Generator, what: str) -> T:
    """One of the pool that fits, uniformly. what: they are, in words."""
    for _ in range(TRIES):
        found = pool[int(rng.integers(len(pool)))]
        if fits(found):
            return found
    raise UserError(
        f"the {len(pool)} {what} of the refcoco dataset hold none of another picture; take more with --set "
        "data.num_examples=N, or name other negatives with --set data.negatives=PATH"
    )
