"""Pictures on disk: PNG files that say how they were made, and labelled contact sheets. No torch, no model.

A picture here is an (H, W, 3) uint8 array; `to_uint8` makes them from what the models return.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from align_cli.files import file_errors, part_path

if TYPE_CHECKING:
    from torch import Tensor

SMALL, SHOWN, LARGE = 128, 160, 384
"""On a sheet, pictures below SMALL pixels are enlarged to about SHOWN (whole factor, nearest neighbour, so
that every pixel of a small picture can be seen); those above LARGE are reduced to LARGE."""
CAPTION_WIDTH = 300
FONT_SIZE, NOTE_SIZE = 16, 14
MARGIN = 14
INK, FAINT, PAPER, LINE = (25, 25, 28), (110, 110, 118), (255, 255, 255), (222, 222, 228)
GOOD, BAD = (20, 120, 60), (176, 42, 36)


@dataclass(frozen=True)
class Note:
    """A few words below a picture. good: True is green, False red, None grey."""

    text: str
    good: bool | None = None


def to_uint8(images: np.ndarray | Tensor) -> np.ndarray:
    """(N, H, W, 3) uint8 of (N, 3, H, W) float in [0, 1] (array or tensor), rounded to the nearest level."""
    array = images if isinstance(images, np.ndarray) else images.detach().float().cpu().numpy()
    if array.ndim != 4:
        raise ValueError(f"pictures must be (N, 3, H, W) float or (N, H, W, 3) uint8, got {array.shape}")
    if array.dtype == np.uint8 and array.shape[3] == 3:
        return array
    if array.dtype == np.uint8 or array.shape[1] != 3:
        raise ValueError(
            f"pictures must be (N, 3, H, W) float or (N, H, W, 3) uint8, got {array.shape} {array.dtype}"
        )
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def save_png(image: np.ndarray | Tensor, path: Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write one picture, with `metadata` as PNG text (read back with `read_metadata`).

    Args:
        image: (H, W, 3) uint8 or (3, H, W) float in [0, 1].
        metadata: keyword -> value; prompt, seed, model, adapter, sampler settings.
    Raises:
        UserError: the file cannot be written; nothing half-written is left.
    """
    write_png(Image.fromarray(np.ascontiguousarray(to_uint8(image[None])[0])), path, metadata or {})


def read_metadata(path: Path) -> dict[str, str]:
    """The text of a PNG that `save_png` wrote."""
    with Image.open(path) as file:
        file.load()
        return {str(key): str(value) for key, value in file.info.items() if isinstance(value, str)}


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | Tensor]],
    captions: Sequence[str],
    path: Path,
    *,
    headers: Sequence[str] = (),
    notes: Sequence[Sequence[Note]] = (),
    title: str = "",
    metadata: Mapping[str, object] | None = None,
) -> None:
    """One PNG: a row per prompt, its caption on the left, its pictures side by side.

    Args:
        rows: R rows of pictures, each (H, W, 3) uint8 or (3, H, W) float in [0, 1].
        captions: R texts. headers: column titles. notes: R rows of words below pictures. title: first line.
    Raises:
        ValueError: no pictures, or captions and notes that do not fit the rows.
        UserError: the file cannot be written.
    """
    if not rows or not all(rows):
        raise ValueError("a contact sheet needs at least one picture in every row")
    if len(captions) != len(rows) or (notes and [len(n) for n in notes] != [len(r) for r in rows]):
        raise ValueError("captions and notes must match the rows of pictures")
    tiles = [[_fit(to_uint8(image[None])[0]) for image in row] for row in rows]
    write_png(_Sheet(tiles, captions, headers, notes, title).draw(), path, metadata or {})


def _fit(image: np.ndarray) -> Image.Image:
    """The picture at the size it has on a sheet."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    side = max(picture.size)
    if side < SMALL:
        factor = max(2, round(SHOWN / side))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if side > LARGE:
        scale = LARGE / side
        size = (round(picture.width * scale), round(picture.height * scale))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


class _Sheet:
    """Layout of a contact sheet: measure first, then draw."""

    def __init__(
        self,
        tiles: list[list[Image.Image]],
        captions: Sequence[str],
        headers: Sequence[str],
        notes: Sequence[Sequence[Note]],
        title: str,
    ) -> None:
        self.tiles, self.headers, self.notes = tiles, headers, notes
        self.font, self.small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(NOTE_SIZE)
        columns = max(len(row) for row in tiles)
        self.tile = max(image.width for row in tiles for image in row)
        self.width = CAPTION_WIDTH + 2 * MARGIN + columns * (self.tile + MARGIN)
        self.title = wrap(title, self.width - 2 * MARGIN, self.small) if title else []
        self.captions = [wrap(text, CAPTION_WIDTH - MARGIN, self.font) for text in captions]
        self.words = [[wrap(note.text, self.tile, self.small) for note in row] for row in notes]
        self.heights = [self._row_height(i) for i in range(len(tiles))]
        self.heading = MARGIN + (len(self.title) * (NOTE_SIZE + 5) + MARGIN // 2 if title else 0)
        self.top = self.heading + (FONT_SIZE + MARGIN if headers else 0)

    def _row_height(self, i: int) -> int:
        note = max((len(lines) for lines in self.words[i]), default=0) if self.words else 0
        pictures = max(image.height for image in self.tiles[i]) + (note * (NOTE_SIZE + 4) + 4 if note else 0)
        return max(pictures, len(self.captions[i]) * (FONT_SIZE + 4)) + 2 * MARGIN

    def draw(self) -> Image.Image:
        sheet = Image.new("RGB", (self.width, self.top + sum(self.heights)), PAPER)
        pen = ImageDraw.Draw(sheet)
        y = MARGIN
        for line in self.title:
            pen.text((MARGIN, y), line, FAINT, self.small)
            y += NOTE_SIZE + 5
        for j, header in enumerate(self.headers):
            pen.text((self._x(j), self.heading), header, INK, self.font)
        y = self.top
        for i, row in enumerate(self.tiles):
            pen.line((MARGIN, y, self.width - MARGIN, y), LINE)
            for k, line in enumerate(self.captions[i]):
                pen.text((MARGIN, y + MARGIN + k * (FONT_SIZE + 4)), line, INK, self.font)
            for j, image in enumerate(row):
                self._picture(sheet, pen, image, i, j, y + MARGIN)
            y += self.heights[i]
        return sheet

    def _x(self, column: int) -> int:
        return MARGIN + CAPTION_WIDTH + column * (self.tile + MARGIN)

    def _picture(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image, i: int, j: int, y: int
    ) -> None:
        x = self._x(j)
        sheet.paste(image, (x, y))
        pen.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=LINE)
        if not self.words:
            return
        good = self.notes[i][j].good
        ink = FAINT if good is None else GOOD if good else BAD
        for k, line in enumerate(self.words[i][j]):
            pen.text((x, y + image.height + 5 + k * (NOTE_SIZE + 4)), line, ink, self.small)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks; a word that is too long is broken anywhere. Blanks
    before a lone comma or full stop, which some captions have, are left out.
    """
    lines: list[str] = []
    line = ""
    for word in re.sub(r"\s+([,.;:!?])(?=\s|$)", r"\1", text).split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, object]) -> None:
    """Write to a temporary name in the same folder, then rename. UserError if it cannot be written."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, str(value))
    with file_errors(f"cannot write {path}", "make room, or choose another folder with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_path(path)
        try:
            with part.open("wb") as file:
                image.save(file, format="PNG", pnginfo=info)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
