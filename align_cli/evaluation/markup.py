"""HTML that escapes by construction, and how numbers are written in it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

NONE = "\u2013"
"""What stands where there is no number: a dash."""
MINUS = "\u2212"
VOID = frozenset({"meta", "input", "br", "col", "img"})
"""Elements that are written without content and without an end tag."""


class Html(str):
    """Text that is markup already. Only `tag` and `join` make it from text that may hold anything."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: object) -> Html:
    """One element; whatever is not `Html` is escaped.

    Args:
        name: of the element.
        children: `Html`, anything that `str` can write, None (left out), or iterables of these.
        attributes: `class_` is class, `data_x` is data-x; None and False are left out, True stands bare.
    """
    written = "".join(
        f" {key.strip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """The children one after another, escaped where they are not `Html`."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif isinstance(child, Iterable):
            parts.append(join(child))
        elif child is not None:
            parts.append(escape(str(child)))
    return Html("".join(parts))


def finite(value: object) -> float | None:
    """The number, or None for what is none: null, NaN, an infinity, a text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: object, decimals: int = 3) -> str:
    """With a real minus and commas between thousands; a dash where there is no number."""
    x = finite(value)
    return NONE if x is None else f"{x:,.{decimals}f}".replace("-", MINUS)


def signed(value: object, decimals: int = 3) -> str:
    """With its sign, also where it rounds to nothing. Only 0 itself has none."""
    x = finite(value)
    if x is None or x == 0:
        return number(value, decimals)
    return f"{x:+,.{decimals}f}".replace("-", MINUS)


def interval(low: object, high: object, decimals: int = 3, *, sign: bool = True) -> str:
    """[low, high], or a dash if one of them is no number."""
    if finite(low) is None or finite(high) is None:
        return NONE
    write = signed if sign else number
    return f"[{write(low, decimals)}, {write(high, decimals)}]"


def count(value: object) -> str:
    """A whole number with commas, or a dash."""
    return number(value, 0)


def percent(value: object, decimals: int = 0) -> str:
    """A share as a percentage, or a dash."""
    x = finite(value)
    return NONE if x is None else f"{100 * x:.{decimals}f} %"


def p_value(value: object) -> str:
    """A probability: three decimals, "< 0.001" below that, or a dash."""
    x = finite(value)
    if x is None:
        return NONE
    return "< 0.001" if x < 0.001 else f"{x:.3f}"


def plural(n: int, word: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def decimals_of(results: Mapping[str, Any]) -> dict[str, int]:
    """Metric -> decimals that show its difference to about two figures of its interval's half width; where
    nothing was compared, of its mean's; between 2 and 5.
    """
    found: dict[str, int] = {}
    for row in [*results["comparisons"], *results["means"]]:
        low, high = finite(row["low"]), finite(row["high"])
        if row["group"] is None and row["metric"] not in found and low is not None and high is not None:
            half = (high - low) / 2
            found[row["metric"]] = min(5, max(2, 1 - math.floor(math.log10(half)))) if half > 0 else 3
    return found
