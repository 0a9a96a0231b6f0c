"""The pictures inside an evaluation report: small copies as text, as many as a limit allows. No torch."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from align_cli.evaluation.markup import finite

SIDE = 256
"""Longest side of an embedded picture, px."""
LOSSLESS = 128
"""Pictures up to this side keep every pixel: they are shown enlarged."""
QUALITY = 80
TYPE = "image/webp"
MAX_BYTES = 64 * 2**20
"""Text of embedded pictures in one report: about 4,000 to 8,000 pictures of 256 px."""
CHUNK = 64
"""Items that are read at once."""


@dataclass(frozen=True)
class Embedded:
    """items: index -> one base64 WebP per arm, "" where there is no picture; an item that is not here did
    not fit. missing: pictures that results.json does not name, or that are not there or cannot be read.
    """

    items: dict[int, list[str]]
    missing: int

    @property
    def pictures(self) -> int:
        """How many pictures are embedded."""
        return sum(bool(text) for texts in self.items.values() for text in texts)


def embed(
    items: Sequence[Mapping[str, Any]], arms: Sequence[str], folder: Path, order: Sequence[int], limit: int
) -> Embedded:
    """Small copies of the pictures of the items in `order`, until their text would exceed `limit` bytes.

    Args:
        items: those of results.json. arms: names. folder: what the paths of the pictures start from.
        order: indices of items, the most important first. limit: bytes of base64.
    """

    def read(i: int) -> list[str]:
        return [_text(folder, items[i]["images"].get(arm)) for arm in arms]

    done: dict[int, list[str]] = {}
    size = missing = 0
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            for i, texts in zip(chunk, pool.map(read, chunk), strict=True):
                size += sum(map(len, texts))
                if size > limit:
                    return Embedded(done, missing)
                done[i] = texts
                missing += sum(not text for text in texts)
    return Embedded(done, missing)


def picture_order(
    items: Sequence[Mapping[str, Any]], arms: Sequence[str], baseline: str, metrics: Sequence[str]
) -> list[int]:
    """Every item once: first in any order that the grid offers, first here. So when not all pictures fit,
    each order still begins with pictures.
    """
    n = len(items)
    orders: list[Sequence[int]] = [range(n)]
    for metric in metrics:
        scores = [item["scores"].get(metric, {}) for item in items]
        for arm in arms:
            values = [_gain(row, arm, baseline) for row in scores]
            known = [i for i in range(n) if values[i] is not None]
            known.sort(key=lambda i: -values[i])  # type: ignore[operator]
            orders += [known, known[::-1]]
    return list(dict.fromkeys(_turns(orders)))


def _gain(row: Mapping[str, object], arm: str, baseline: str) -> float | None:
    """Arm above baseline; the score itself for the baseline."""
    x, base = finite(row.get(arm)), finite(row.get(baseline))
    if arm == baseline or x is None:
        return x
    return None if base is None else x - base


def _turns(orders: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first of each, the second of each, and so on."""
    for place in range(max(map(len, orders))):
        yield from (order[place] for order in orders if place < len(order))


def _text(folder: Path, path: str | None) -> str:
    """Base64 WebP of a picture, or "" where there is none that can be read."""
    if not path:
        return ""
    try:
        with Image.open(folder / path) as file:
            picture = file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
        return ""
    return webp(picture)


def webp(picture: Image.Image) -> str:
    """Base64 of a picture, made smaller if its longest side is above SIDE."""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, lossless=max(picture.size) <= LOSSLESS)
    return b64encode(buffer.getvalue()).decode("ascii")
