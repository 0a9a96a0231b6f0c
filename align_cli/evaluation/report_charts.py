"""Inline SVG of the evaluation report: bars with intervals. Positions are percentages, so that every picture
is as wide as there is room for while its text keeps its size. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from align_cli.evaluation.markup import Html, finite, number, tag

BAR, GLYPH = 22, 18
"""Heights of a bar's row and of the small interval in a table, px."""
AXIS = 24


class Scale:
    """Maps values to percentages of a width; `ticks` are round numbers inside it."""

    def __init__(self, values: Iterable[object]) -> None:
        """values: numbers that shall be seen, beside 0; what is no number is passed over."""
        seen = [0.0, *(x for x in map(finite, values) if x is not None)]
        low, high = min(seen), max(seen)
        if low == high:
            low, high = -1.0, 1.0
        pad = 0.04 * (high - low)
        self.low, self.high = low - (pad if low < 0 else 0), high + (pad if high > 0 else 0)
        self.ticks, self.decimals = _ticks(self.low, self.high)

    def at(self, value: float) -> float:
        """Position in percent, kept between 0 and 100."""
        return min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low)))


def _ticks(low: float, high: float) -> tuple[list[float], int]:
    """Multiples of 1, 2 or 5 times a power of ten, as few as there can be but three, and their decimals."""
    power = math.floor(math.log10(high - low))
    while True:
        for factor in (5, 2, 1):
            step = factor * 10.0**power
            first, last = math.ceil(low / step), math.floor(high / step)
            if last - first >= 2:
                return [i * step for i in range(first, last + 1)], max(0, -power)
        power -= 1


def difference_scale(rows: Iterable[tuple[object, object, object]]) -> Scale:
    """A scale for (value, low, high) in which a few very wide intervals do not squeeze all the rest: ends are
    seen up to four times the largest value, or the median end, whichever is more.
    """
    triples = [[finite(x) for x in row] for row in rows]
    values = [abs(row[0]) for row in triples if row[0] is not None]
    ends = sorted(abs(x) for row in triples for x in row[1:] if x is not None)
    limit = max(4 * max(values, default=0.0), ends[len(ends) // 2] if ends else 0.0)
    shown = [x if x is None else min(limit, max(-limit, x)) for row in triples for x in row]
    return Scale(shown)


def bar(scale: Scale, value: object, low: object, high: object, kind: str) -> Html:
    """A bar from 0 to the value with its interval as a whisker; kind: a class for its colour."""
    x = finite(value)
    parts = [_line(scale.at(t), 0, BAR, "zero" if t == 0 else "tick") for t in scale.ticks]
    if x is not None:
        left, right = sorted((scale.at(0), scale.at(x)))
        parts.append(tag("rect", x=_pc(left), y=4, width=_pc(right - left), height=BAR - 8, class_=kind))
    parts += _whisker(scale, low, high, BAR / 2)
    return _svg(BAR, parts)


def axis(scale: Scale) -> Html:
    """The tick labels below a column of bars; those of class minor have no room on a narrow page."""
    labels = []
    for value in scale.ticks:
        at = scale.at(value)
        anchor = "start" if at < 8 else "end" if at > 92 else "middle"
        far = value in (scale.ticks[0], scale.ticks[-1]) and abs(at - scale.at(0)) > 25
        kind = None if value == 0 or far else "minor"
        text = number(value, scale.decimals)
        labels.append(tag("text", text, x=_pc(at), y=15, text_anchor=anchor, class_=kind))
    return _svg(AXIS, labels, "axis")


def glyph(value: object, low: object, high: object, kind: str) -> Html:
    """An interval around 0 to its own scale: a look whether it holds 0. Empty without an interval."""
    x = finite(value)
    if x is None or finite(low) is None or finite(high) is None:
        return Html("")
    scale = Scale((x, low, high))
    parts = [_line(scale.at(0), 0, GLYPH, "zero"), *_whisker(scale, low, high, GLYPH / 2)]
    parts.append(tag("circle", cx=_pc(scale.at(x)), cy=GLYPH / 2, r=4, class_=kind))
    return _svg(GLYPH, parts, "glyph")


def share(value: object) -> Html:
    """A share of 1 as a filled bar; empty without a number."""
    x = finite(value)
    if x is None:
        return Html("")
    full = tag("rect", x=0, y=5, width="100%", height=8, class_="back")
    return _svg(GLYPH, [full, tag("rect", x=0, y=5, width=_pc(100 * min(1.0, x)), height=8)], "share")


def _whisker(scale: Scale, low: object, high: object, middle: float) -> list[Html]:
    """The interval with end caps; an end outside the scale runs to the edge and has no cap."""
    a, b = finite(low), finite(high)
    if a is None or b is None:
        return []
    line = tag("line", x1=_pc(scale.at(a)), x2=_pc(scale.at(b)), y1=middle, y2=middle, class_="whisker")
    inside = (x for x in (a, b) if scale.low <= x <= scale.high)
    return [line, *(_line(scale.at(x), middle - 4, middle + 4, "whisker") for x in inside)]


def _line(at: float, top: float, bottom: float, kind: str) -> Html:
    return tag("line", x1=_pc(at), x2=_pc(at), y1=top, y2=bottom, class_=kind)


def _svg(height: int, parts: Iterable[Html], kind: str = "bar") -> Html:
    """Hidden from screen readers: the numbers stand in the same row."""
    return tag("svg", parts, width="100%", height=height, class_=kind, aria_hidden="true", focusable="false")


def _pc(value: float) -> str:
    return f"{value:.2f}%"
