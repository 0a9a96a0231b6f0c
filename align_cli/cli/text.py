"""Plain text for the terminal and for pipes alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from align_cli.evaluation.results import BaseResult, PairedResult

PLAIN_WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


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


def print_table(result: BaseResult | PairedResult) -> None:
    """The table of an evaluation on stdout; in a file or a pipe PLAIN_WIDTH columns and no blank lines."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(result.to_table(console.width))
        return
    plain = Console(width=PLAIN_WIDTH)
    with plain.capture() as captured:
        plain.print(result.to_table(PLAIN_WIDTH))
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))


def say_loading(model: str) -> None:
    """Tell on stderr what takes the first seconds: to be called before torch is imported."""
    if os.environ.get("RANK", "0") == "0":  # the first of several processes
        typer.echo(f"loading {model} ...", err=True)
