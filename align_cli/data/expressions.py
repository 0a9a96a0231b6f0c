"""Referring expressions in MDETR's layout: COCO-style JSON with one "image" entry per expression."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from align_cli.errors import UserError

Corners = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
Span = tuple[int, int]
"""Characters [start, end) of an expression."""


@dataclass(frozen=True, slots=True)
class Expression:
    """What a text refers to in a picture. size: (height, width) in pixels. boxes: at least one, inside the
    picture and with an area; spans: per box the parts of the text that name it, at least one.
    """

    text: str
    file: str
    size: tuple[int, int]
    boxes: tuple[Corners, ...]
    spans: tuple[tuple[Span, ...], ...]


@dataclass
class _LeftOut:
    """What is left out of a file, in words, how often, and where first."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        self.found.setdefault(what, []).append(where)

    def warn(self, path: Path) -> None:
        if self.found:
            each = [f"{len(places)} {what} (the first: {places[0]})" for what, places in self.found.items()]
            warnings.warn(f"{path}: left out are {', '.join(each)}", stacklevel=3)


def read_expressions(path: Path) -> tuple[list[Expression], str]:
    """The expressions of a file in the order of their ids, and the sha256 of its bytes.

    Boxes of crowds are left out, and those that have no area after they were cut at the edges of their
    picture, as in the official code. So are spans that lie outside of the expression, boxes that then have
    none, and expressions without a box, which the official code keeps. One warning counts them all.

    Raises:
        UserError: no file, no JSON of this layout, a record that is wrong (named), or nothing is left.
    """
    raw, digest = _read(path)
    left_out = _LeftOut()
    notes: dict[int, list[dict[str, Any]]] = {}
    for note in raw["annotations"]:
        notes.setdefault(_whole(note, "image_id", f"{path}, an annotation"), []).append(note)
    images = {_whole(image, "id", f"{path}, an image"): image for image in raw["images"]}
    if astray := next((i for i in notes if i not in images), None):
        raise UserError(f"{path}: an annotation is of image {astray}, which the file does not have")
    files: dict[str, str] = {}  # one text per picture, not one per expression
    found = []
    for i in sorted(images):
        image, where = images[i], f"{path}, image {i}"
        text, file = _text(image, "caption", where), _text(image, "file_name", where)
        size = _whole(image, "height", where, least=1), _whole(image, "width", where, least=1)
        named = [_box(note, size, text, path, left_out) for note in notes.get(i, [])]
        there = [pair for pair in named if pair is not None]
        if not there:
            left_out.add("expressions without a box", f"image {i}")
            continue
        boxes, spans = zip(*there, strict=True)
        found.append(Expression(text, files.setdefault(file, file), size, boxes, spans))
    left_out.warn(path)
    if not found:
        raise UserError(f"{path} holds no expression with a box in its picture")
    return found, digest


def _box(
    note: dict[str, Any], size: tuple[int, int], text: str, path: Path, left_out: _LeftOut
) -> tuple[Corners, tuple[Span, ...]] | None:
    """A box cut at the edges of its picture, and the parts of the text that name it; None to leave it out."""
    name = f"annotation {note.get('id', 'without id')}"
    where = f"{path}, {name}"
    if note.get("iscrowd"):
        left_out.add("boxes of crowds", name)
        return None
    box = note.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
        raise UserError(f"{where}: bbox must be x, y, width, height in pixels, got {box!r}"[:300])
    x, y, width, height = box
    (bottom, right), clip = size, lambda value, most: float(min(max(value, 0), most))
    corners = clip(x, right), clip(y, bottom), clip(x + width, right), clip(y + height, bottom)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        left_out.add("boxes without area in their picture", name)
        return None
    spans = note.get("tokens_positive")
    if not isinstance(spans, list) or not all(_is_span(span) for span in spans):
        raise UserError(f"{where}: tokens_positive must be a list of [start, end], got {spans!r}"[:300])
    inside = tuple((a, b) for a, b in spans if 0 <= a < b <= len(text))
    if len(inside) < len(spans):
        left_out.add("phrases outside of their expression", name)
    if not inside:
        left_out.add("boxes that no phrase names", name)
        return None
    return corners, inside


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        content = path.read_bytes()
        raw = json.loads(content)
    except FileNotFoundError:
        raise UserError(f"no file of expressions {path}; see data.path and data.expressions") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error) or type(error).__name__}") from None
    for key in ("images", "annotations"):
        rows = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is no file of expressions: it has no list of {key}")
    return raw, sha256(content).hexdigest()


def _whole(row: dict[str, Any], key: str, where: str, least: int = 0) -> int:
    value = row.get(key)
    if not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key} must be a whole number >= {least}, got {value!r}"[:300])
    return value


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must be a text that is not empty, got {value!r}"[:300])
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, int) for x in value)
