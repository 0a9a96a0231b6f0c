"""The comparison of all methods as a picture: a row per model and method, a point with its interval. No
torch.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from align_cli.evaluation.all_methods import Comparison, Gain, duration, title
from align_cli.evaluation.report_charts import Scale
from align_cli.evaluation.stats import GAIN, LOSS
from align_cli.pictures import BAD, FAINT, FONT_SIZE, GOOD, INK, LINE, MARGIN, NOTE_SIZE, PAPER, write_png

LABEL, PANEL, GAP, ROW, DOT = 250, 400, 44, 30, 5
"""Pixels: names, each of the two panels, blanks between them, height of a row, radius of a point."""
PANELS = ("gain in all", "the same, long captions alone")


def save_forest(found: Comparison, path: Path) -> None:
    """Write the PNG. UserError if it cannot be written."""
    about = {"command": " ".join(found.command), "software": "t2ialign"}
    write_png(_Forest(found).draw(), path, about)


class _Forest:
    """Layout first, then grid, names and points."""

    def __init__(self, found: Comparison) -> None:
        self.found = found
        self.font, self.small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(NOTE_SIZE)
        rows = [row for family in found.families for row in family.rows]
        gains = [gain for row in rows for gain in (row.gain, row.long_gain)]
        self.scale = Scale(x for gain in gains for x in (gain.difference, gain.low, gain.high))
        self.width = 2 * MARGIN + LABEL + 2 * PANEL + GAP
        self.top = 2 * MARGIN + 2 * (NOTE_SIZE + 6) + FONT_SIZE
        self.bottom = self.top + ROW * (len(rows) + len(found.families))
        self.sheet = Image.new("RGB", (self.width, self.bottom + ROW + MARGIN), PAPER)
        self.pen = ImageDraw.Draw(self.sheet)

    def draw(self) -> Image.Image:
        self._head()
        self._grid()
        y = self.top
        for family in self.found.families:
            self.pen.line((MARGIN, y, self.width - MARGIN, y), LINE)
            self.pen.text((MARGIN, y + 5), family.model, INK, self.font)
            for row in family.rows:
                y += ROW
                self.pen.text((MARGIN + 16, y + 5), title(row), INK, self.font)
                took = duration(row.seconds)
                self.pen.text((MARGIN + LABEL - 20, y + 7), took, FAINT, self.small, anchor="ra")
                for panel, gain in enumerate((row.gain, row.long_gain)):
                    self._gain(panel, y + ROW // 2, gain)
            y += ROW
        return self.sheet

    def _head(self) -> None:
        lines = (
            f"difference to the base with its 95 % interval, {self.found.num} prompts of "
            f"{self.found.prompts}; beside the names: training",
            "green, red: beyond chance, corrected for the number of comparisons; grey: not",
        )
        for i, line in enumerate(lines):
            self.pen.text((MARGIN, MARGIN + i * (NOTE_SIZE + 6)), line, FAINT, self.small)
        for panel, name in enumerate(PANELS):
            self.pen.text((self._left(panel), self.top - FONT_SIZE - 8), name, INK, self.font)

    def _grid(self) -> None:
        for panel in range(len(PANELS)):
            for tick in self.scale.ticks:
                x = self._x(panel, tick)
                self.pen.line((x, self.top, x, self.bottom), LINE if tick else FAINT)
                text = f"{tick:+.{self.scale.decimals}f}" if tick else "0"
                self.pen.text((x, self.bottom + 6), text, FAINT, self.small, anchor="ma")

    def _left(self, panel: int) -> int:
        return MARGIN + LABEL + panel * (PANEL + GAP)

    def _x(self, panel: int, value: float) -> float:
        return self._left(panel) + PANEL * self.scale.at(value) / 100

    def _gain(self, panel: int, y: int, gain: Gain) -> None:
        ink = {GAIN: GOOD, LOSS: BAD}.get(gain.verdict, FAINT)
        x, ends = self._x(panel, gain.difference), [z for z in (gain.low, gain.high) if z is not None]
        if len(ends) == 2:
            low, high = (self._x(panel, value) for value in ends)
            self.pen.line((low, y, high, y), ink, 2)
            for end in (low, high):
                self.pen.line((end, y - 4, end, y + 4), ink, 2)
        self.pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), ink)
