"""The tables that an evaluation prints, made from results.json: the answer to "did it help?"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import typer
from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from align_cli.evaluation.stats import GAIN, LOSS, MIN_CLUSTERS, NO_CHANGE, TOO_FEW

STYLES = {GAIN: "bold green", LOSS: "bold red", NO_CHANGE: "dim", TOO_FEW: "dim"}
WIDE = 92
"""Columns of text from which cells stand three blanks apart, and not one."""
FLOOR_COLUMN = 100
"""Columns of text from which the floor has a column of its own."""
GROUPS_SHOWN = 8
"""Groups of a grouping up to which they are printed; more are in the report."""
LABEL = 12
"""Columns that the name of a metric has at least."""
PLAIN_WIDTH = 100
"""Columns of text that goes to a file or a pipe; more where a table needs them."""


def print_results(results: Mapping[str, Any]) -> None:
    """The tables on stdout; in a file or a pipe PLAIN_WIDTH columns and no blank lines."""
    console = Console()
    if console.is_terminal:
        console.print(results_table(results, console.width))
        return
    content = results_table(results, PLAIN_WIDTH)
    tables = [part for part in content.renderables if isinstance(part, Table)]
    whole = Console(width=10 * PLAIN_WIDTH)  # no number is cut where nothing sets the width
    natural = max((Measurement.get(whole, whole.options, table).maximum for table in tables), default=0)
    plain = Console(width=max(PLAIN_WIDTH, natural))
    with plain.capture() as captured:
        plain.print(content)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))


def results_table(results: Mapping[str, Any], width: int = PLAIN_WIDTH) -> Group:
    """What is printed: the answer in words, one row per metric with its interval, the headlines by group, and
    what it was measured on.
    """
    words = [Text(line, _style(line)) for line in results["words"]]
    if not results["scorers"]:
        return Group(*words, *_footer(results, width))
    body = _compared(results, width) if results["comparisons"] else _alone(results, width)
    return Group(*words, body, *_official(results), *_footer(results, width))


def _style(line: str) -> str:
    for verdict in (GAIN, LOSS):
        if f": {verdict}, " in line:
            return STYLES[verdict]
    return "bold" if line.startswith("reward hacking") else ""


def _table(width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0) if width >= WIDE else 0)
    table.add_column("metric", overflow="ellipsis", min_width=LABEL)
    return table


def _compared(results: Mapping[str, Any], width: int) -> Table:
    """Base against aligned. A column names the arm where there are several."""
    arms = list(dict.fromkeys(row["arm"] for row in results["comparisons"]))
    table = _table(width)
    floor = _floor_column(results, width)
    if len(arms) > 1:
        table.add_column("arm", no_wrap=True)
    other = "arm" if len(arms) > 1 else arms[0]
    for name in (results["baseline"], other, "difference", "95 % CI", "n", *(["floor"] if floor else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for label, row, style in _rows(results, "comparisons"):
        cells = [row["arm"]] if len(arms) > 1 else []
        cells += [_number(row["base"]), _number(row["aligned"]), _signed(row["difference"])]
        cells += [_interval(row["low"], row["high"], _signed), str(row["n"])]
        if floor:
            cells.append(_number(results["floor"].get(row["metric"]) if row["group"] is None else None))
        trained = "" if row["held_out"] else " (trained on)"
        verdict = (
            Text(row["verdict"] + trained, STYLES[row["verdict"]]) if row["n"] else Text("not asked", "dim")
        )
        table.add_row(Text(label), *cells, verdict, style=style)
    return table


def _floor_column(results: Mapping[str, Any], width: int) -> bool:
    """Does the floor have a column? Else it stands below the table."""
    arms = {row["arm"] for row in results["comparisons"]}
    own = any(row["metric"] in results["floor"] for row in results["comparisons"])
    return own and len(arms) == 1 and width >= FLOOR_COLUMN


def _alone(results: Mapping[str, Any], width: int) -> Table:
    """Means of arms that are compared with nothing."""
    table = _table(width)
    names = ("score", "95 % CI", "n", *(["floor"] if results["floor"] else []))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for label, row, style in _rows(results, "means"):
        few = "not asked" if not row["n"] else TOO_FEW if row["clusters"] < MIN_CLUSTERS else ""
        floor = [_number(results["floor"].get(row["metric"]) if row["group"] is None else None)]
        cells = [_number(row["mean"]), _interval(row["low"], row["high"], _number), str(row["n"])]
        table.add_row(
            Text(label), *cells, *(floor if results["floor"] else []), Text(few, "dim"), style=style
        )
    return table


def _rows(results: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any], str]]:
    """(label, row, style): every metric of every scorer, its headline last, with the groups below it."""
    shown = [name for name in results["benchmark"]["group_names"] if _few(results, name)]
    found: list[tuple[str, Mapping[str, Any], str]] = []
    alone = len(results["scorers"]) == 1
    for scorer in results["scorers"]:
        for metric in scorer["metrics"]:
            head = metric == scorer["headline"]
            for row in results[key]:
                if row["metric"] != metric:
                    continue
                if row["group"] is None:
                    short = metric.removeprefix(f"{scorer['name']}/")
                    label = short if not head else f"* {short if alone else metric}"
                    found.append((label, row, "bold" if head else ""))
                elif head and row["group"][0] in shown:
                    found.append((f"    {row['group'][0]}: {row['group'][1]}", row, ""))
    return found


def _few(results: Mapping[str, Any], name: str) -> bool:
    values = {item["groups"].get(name) for item in results["items"]}
    return 1 < len(values) <= GROUPS_SHOWN


def _official(results: Mapping[str, Any]) -> list[Text]:
    """A protocol's numbers, a line per arm; the benchmark's own table, a line per arm and metric."""
    found: list[str] = []
    if results["protocol"]:
        for arm, numbers in results["protocol"]["averages"].items():
            means = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            found.append(f"{arm}, protocol {results['protocol']['name']}: {means}")
    lines: dict[tuple[str, str], list[str]] = {}
    for row in results["official"]:
        spread = "" if row["std"] is None else f" +- {row['std']:.4f}"
        text = f"{row['label']} {_number(row['value'])}{spread}"
        lines.setdefault((row["arm"], row["metric"]), []).append(text)
    found += [f"{arm}, {metric} as officially reported: {', '.join(parts)}"
              for (arm, metric), parts in lines.items()]  # fmt: skip
    return [Text(line) for line in found]


def _footer(results: Mapping[str, Any], width: int) -> list[Text]:
    """Small print: what was measured, on what, how far to trust it."""
    bench, model = results["benchmark"], results["model"]
    several = results["per_prompt"] > 1
    lines = list(results["notes"])
    if results["scorers"]:
        lines.append("* headline of its scorer, fixed before the run." + _meaning(results))
    if results["floor"]:
        scores = ", ".join(f"{k} {_number(v)}" for k, v in results["floor"].items() if v is not None)
        column = _floor_column(results, width) or not results["comparisons"]
        means = results.get("floor_means") or (
            f"pictures of {results['baseline']} judged against other prompts of their kind (no alignment at "
            "all)"
        )
        lines.append(f"floor: {means}{'' if column else ': ' + scores}.")
    lines += [_drift(row) for row in results["drift"]]
    if results["drift"] and all(row["diversity"] is None for row in results["drift"]):
        need = "" if several else "--per-prompt 2 and "
        lines.append(f"diversity between seeds is not measured: it needs {need}a scorer with an image tower.")
    each = f", {results['per_prompt']} pictures each" if several else ""
    same = ", same prompts and noise for every arm" if len(results["arms"]) > 1 and results["sample"] else ""
    lines.append(
        f"{bench['prompts']} prompts of {bench['source']}{each}, noise of seed {results['seed']}{same}; "
        f"{_intervals(results)}"
    )
    times = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    memory = results["memory"]
    gpu = f", {memory['gpu'] / 2**30:.2f} GiB on the GPU" if memory["gpu"] else ""
    lines.append(
        f"{model['id']}{_sampling(results['sample'])}, {model['dtype']} on {model['device']}: {times}, peak "
        f"memory {memory['process'] / 2**20:,.0f} MiB{gpu}"
    )
    return [Text(line, "dim") for line in lines]


def _meaning(results: Mapping[str, Any]) -> str:
    if any(scorer["headline"] == "shapes/all" for scorer in results["scorers"]):
        return " all: all that is asked for is there, and no object more."
    return ""


def _intervals(results: Mapping[str, Any]) -> str:
    by = results["unit"].removesuffix("s")
    sort = f"{results['interval']} " if results["comparisons"] else ""  # means have a t or Wilson's interval
    kind = f"95 % {sort}intervals clustered by {by}, trusted from {MIN_CLUSTERS} of them"
    judged = [row for row in results["comparisons"] if row["verdict"] != TOO_FEW]
    heads = sum(row["headline"] and row["group"] is None for row in judged)
    rest = len(judged) - heads
    if heads + rest < 2:
        return f"{kind}."
    return f"{kind}; verdicts corrected for {heads} headline and {rest} other comparisons (Holm)."


def _drift(row: Mapping[str, Any]) -> str:
    parts = [f"saturation {_number(row['saturation_base'])} -> {_number(row['saturation'])}"]
    parts.append(f"clipped {_number(row['clipped_base'])} -> {_number(row['clipped'])}")
    if row["feature_distance"] is not None:
        parts.append(f"feature distance ({row['feature_of']}) {_number(row['feature_distance'])}")
    if row["diversity"] is not None and row["diversity_base"] is not None:
        parts.append(
            f"diversity between seeds {_number(row['diversity_base'])} -> {_number(row['diversity'])}"
        )
    return f"drift of {row['arm']}: {', '.join(parts)}."


def _sampling(sample: Mapping[str, Any]) -> str:
    return f", {sample['sampler']} {sample['steps']} steps, guidance {sample['guidance']:g}" if sample else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    """With its sign, also where it rounds to nothing: -0.000 is below 0. Only 0 itself has none."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if value else "0.000"


def _interval(low: float | None, high: float | None, text: Any) -> str:
    return "-" if low is None or high is None or math.isinf(low) else f"[{text(low)}, {text(high)}]"
