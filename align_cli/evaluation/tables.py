"""The tables that an evaluation prints: the answer to "did it help?"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from align_cli.evaluation.stats import GAIN, LOSS, MIN_CLUSTERS, NO_CHANGE, TOO_FEW, Estimate, Paired

if TYPE_CHECKING:
    from align_cli.evaluation.results import BaseResult, PairedResult, RunFacts

STYLES = {GAIN: "bold green", LOSS: "bold red", NO_CHANGE: "dim", TOO_FEW: "dim"}
WIDE = 92
"""Columns of text from which cells stand three blanks apart, and not one."""
FLOOR_COLUMN = 100
"""Columns of text from which the floor has a column of its own."""


def paired_table(result: PairedResult, width: int = 100) -> Group:
    """Verdict, one row per metric with its interval, the headline last and by kind of prompt, the facts."""
    table = _table(width)
    column = width >= FLOOR_COLUMN
    for name in ("base", "aligned", "difference", "95 % CI", "n", *(["floor"] if column else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def add(name: str, row: Paired, style: str = "") -> None:
        cells = [
            _number(row.base),
            _number(row.aligned),
            _signed(row.difference),
            _interval(row.low, row.high),
            str(row.n),
        ]
        if column:
            cells.append(_number(result.floor.get(name.removeprefix("* "), math.nan)))
        verdict = Text(row.verdict, STYLES[row.verdict]) if row.n else Text("not asked", "dim")
        table.add_row(name, *cells, verdict, style=style)

    _rows(table, result.rows, result.kinds, result.headline, add)
    return Group(
        Padding(_verdict_line(result), (1, 0, 0, 0)),
        table,
        *_footer(result.facts, "base", {} if column else result.floor),
    )


def base_table(result: BaseResult, width: int = 100) -> Group:
    """One row per metric with its interval and the floor."""
    table = _table(width)
    for name in ("score", "95 % CI", "n", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def add(name: str, row: Estimate, style: str = "") -> None:
        interval = f"[{_number(row.low)}, {_number(row.high)}]" if row.n else "-"
        floor = _number(result.floor.get(name.removeprefix("* "), math.nan))
        few = "not asked" if not row.n else TOO_FEW if row.clusters < MIN_CLUSTERS else ""
        table.add_row(name, _number(row.mean), interval, str(row.n), floor, Text(few, "dim"), style=style)

    _rows(table, result.rows, result.kinds, result.headline, add)
    return Group(table, *_footer(result.facts, "these", {}))


def _table(width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0) if width >= WIDE else 0)
    table.add_column("metric", no_wrap=True)
    return table


def _rows(
    table: Table,
    rows: Mapping[str, Estimate | Paired],
    kinds: Mapping,
    headline: str,
    add: Callable[..., None],
) -> None:
    """All metrics, a rule, the headline, and the headline per kind of prompt."""
    others = [name for name in rows if name != headline]
    for name in others:
        add(name, rows[name])
    table.add_section()
    add(f"* {headline}", rows[headline], style="bold")
    if len(kinds) > 1:
        for kind, values in kinds.items():
            add(f"    {kind}", values[headline])


def _verdict_line(result: PairedResult) -> Text:
    """The headline in words; "gain" only where the interval excludes 0."""
    row = result.rows[result.headline]
    line = Text()
    line.append(f"{result.headline}: {row.verdict}", STYLES[row.verdict].replace("dim", "bold"))
    if row.n:
        line.append(f"  {_number(row.base)} -> {_number(row.aligned)}, {_signed(row.difference)} ")
        line.append(f"{_interval(row.low, row.high)}; better on {row.up} prompts, worse on {row.down}")
        line.append(f" (sign test p = {_p(row.sign_p)})" if row.up + row.down else "")
    return line


def _footer(facts: RunFacts, whose: str, floor: dict[str, float]) -> list[Text]:
    """Small print. floor: the numbers, where the table has no column for them."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in facts.kinds.items())
    held = " held-out" if facts.split != "train" else ""
    scores = ", ".join(f"{name} {_number(value)}" for name, value in floor.items() if not math.isnan(value))
    scores = f": {scores}" if scores else ""
    both = ", same prompts and noise for both models" if "aligned" in facts.seconds else ""
    lines = [
        "* headline metric, fixed before the run: all that is asked for is there, and no object more.",
        f"floor: {whose} pictures judged against other prompts of their kind (no alignment at all){scores}.",
        f"{facts.prompts}{held} prompts ({facts.split} split: {kinds}; {facts.distinct_prompts} distinct), "
        f"seed {facts.seed}{both}; intervals clustered by composition, trusted from {MIN_CLUSTERS} of them.",
        f"{facts.model}, {_sampling(facts.sample)}, {facts.dtype} on {facts.device}: {_cost(facts)}",
    ]
    return [Text(line, "dim") for line in lines]


def _sampling(sample: Mapping[str, object]) -> str:
    return f"{sample['sampler']} {sample['steps']} steps, guidance {sample['guidance']:g}"


def _cost(facts: RunFacts) -> str:
    times = " + ".join(f"{seconds:.1f} s {name}" for name, seconds in facts.seconds.items())
    if len(facts.seconds) == 1:
        times = f"{sum(facts.seconds.values()):.1f} s"
    gpu = f", {facts.peak_gpu_memory_bytes / 2**30:.2f} GiB on the GPU" if facts.peak_gpu_memory_bytes else ""
    return f"{times}, peak memory {facts.peak_memory_bytes / 2**20:,.0f} MiB{gpu}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    """With its sign, also where it rounds to nothing: -0.000 is below 0. Only 0 itself has none."""
    if math.isnan(value):
        return "-"
    return f"{value:+.3f}" if value else "0.000"


def _interval(low: float, high: float) -> str:
    return "-" if not (math.isfinite(low) and math.isfinite(high)) else f"[{_signed(low)}, {_signed(high)}]"


def _p(value: float) -> str:
    return f"{value:.1g}" if value < 0.001 else f"{value:.3f}"
