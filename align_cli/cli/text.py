"""Plain text for the terminal and for pipes alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from align_cli.launched import tell


def columns(rows: Iterable[Sequence[str]], gap: int = 2) -> str:
    """Rows of cells as left-aligned columns; the last cell of a row is free to run on."""
    table = [tuple(row) for row in rows]
    widths: dict[int, int] = {}
    for row in table:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths.get(i, 0), len(cell))
    lines = [
        "".join(cell.ljust(widths[i] + gap) for i, cell in enumerate(row[:-1])) + row[-1]
        for row in table
        if row
    ]
    return "\n".join(lines)


def say_loading(model: str) -> None:
    """Tell on stderr what takes the first seconds: to be called before torch is imported."""
    tell(f"loading {model} ...")
