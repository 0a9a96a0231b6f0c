"""The sections of the evaluation report that need no script: summary, groups, drift, tokens, provenance. No
torch.

Every function takes results.json as it is and gives one section, or nothing where there is nothing to say.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_cli.evaluation import report_charts as charts
from align_cli.evaluation.markup import (
    NONE,
    Html,
    count,
    finite,
    interval,
    number,
    p_value,
    percent,
    plural,
    signed,
    tag,
)
from align_cli.evaluation.report_words import (
    compared_arms,
    headline_metrics,
    overall,
    verdict_kind,
    verdict_text,
)
from align_cli.evaluation.stats import MIN_CLUSTERS

LOST = 240
"""Characters of lost words that are shown."""
EXAMPLES = 40
"""Cut prompts that are listed per tokenizer."""
SHOWN = frozenset(
    {
        "format",
        "arms",
        "scorers",
        "audit",
        "means",
        "comparisons",
        "drift",
        "words",
        "items",
        "command",
        "floor",
        "floor_means",
        "official",
        "attention",
        "notes",
    }
)
"""Keys of results.json that have a section of their own; all others are listed under provenance."""


def section(name: str, title: str, *children: Any) -> Html:
    """A section with its heading; `name` is what links in the page point to."""
    return tag("section", tag("h2", title), *children, id=name, aria_label=title)


def table(head: Sequence[Any], *bodies: Any, caption: str, kind: str = "") -> Html:
    """A table that scrolls sideways by itself where it does not fit. head: texts, or `<th>` elements."""
    cells = [c if isinstance(c, Html) else tag("th", c, scope="col") for c in head]
    whole = tag(
        "table", tag("caption", caption, class_="sr"), tag("thead", tag("tr", cells)), bodies, class_=kind
    )
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def num_head(*names: str) -> list[Html]:
    """Headings of columns of numbers."""
    return [tag("th", name, scope="col", class_="num") for name in names]


def nums(*texts: str) -> list[Html]:
    """Cells of numbers."""
    return [tag("td", text, class_="num" + (" none" if text == NONE else "")) for text in texts]


def row_head(text: object) -> Html:
    """Heading of a row."""
    return tag("th", text, scope="row", class_="name")


# Summary


def summary(results: Mapping[str, Any], decimals: Mapping[str, int]) -> Html:
    """Held-out scorers first, those an adapter was trained on apart from them."""
    return _compared(results, decimals) if results["comparisons"] else _alone(results, decimals)


def _compared(results: Mapping[str, Any], decimals: Mapping[str, int]) -> Html:
    deciding = headline_metrics(results)
    others = [m for s in results["scorers"] for m in s["metrics"] if m not in deciding]
    words = tag(
        "p",
        f"Difference: arm minus {results['baseline']}, mean over the same prompts, seeds and initial noise. "
        f"Better / worse: {results['unit']} that rose and fell; p sign: their sign test; p adjusted: of a t "
        "test of the difference, corrected for the number of comparisons in this run; a verdict needs it and "
        "the interval. Each interval around 0 has its own scale." + _floor(results, decimals),
        class_="small",
    )
    more = _comparison_table(results, overall(results, others), decimals, "Other metrics") if others else None
    folded = tag("details", tag("summary", "Other metrics of these scorers"), more) if more else None
    main = _comparison_table(results, overall(results, deciding), decimals, "Summary")
    return section("summary", "Summary", main, words, folded)


def _comparison_table(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], decimals: Mapping[str, int], caption: str
) -> Html:
    """Differences over all prompts, by held-out and trained-on scorers, then by metric."""
    arms = compared_arms(results)
    several = len(arms) > 1
    head = [
        tag("th", "Scorer", scope="col"),
        tag("th", "Arm", scope="col") if several else None,
        tag("th", "Verdict", scope="col"),
        *num_head("Difference", "95 % interval"),
        tag("th", "around 0", scope="col", class_="plot"),
        *num_head(results["baseline"], "arm" if several else arms[0], "Better / worse (win rate)"),
        *num_head("p sign", "p adjusted", "n"),
    ]
    span = len(head) - (not several)
    bodies = []
    for held, title in (
        (True, "Held-out scorers"),
        (False, "Scorers that an adapter was trained on: a gain here was asked for and proves nothing"),
    ):
        part = [row for row in rows if bool(row["held_out"]) == held]
        if part:
            text = tag("th", tag("span", title), scope="rowgroup", colspan=span)
            lines = [_summary_rows(part, metric, decimals, several) for metric in _distinct(part, "metric")]
            bodies.append(
                tag("tbody", tag("tr", text, class_="rowgroup"), lines, class_=None if held else "trained")
            )
    shown = [c for c in head if c is not None]
    return table(shown, bodies, caption=caption, kind="wide")


def _summary_rows(
    rows: Sequence[Mapping[str, Any]], metric: str, decimals: Mapping[str, int], several: bool
) -> list[Html]:
    """One metric, arm by arm."""
    rows, d = [row for row in rows if row["metric"] == metric], decimals.get(metric, 3)
    lines = []
    for i, row in enumerate(rows):
        kind = verdict_kind(row["verdict"])
        mark = None if row["held_out"] else tag("span", "trained on", class_="mark")
        cells = [
            tag("th", metric, mark, scope="row", rowspan=len(rows), class_="name") if i == 0 else None,
            tag("td", row["arm"], class_="arm") if several else None,
            tag("td", verdict_text(row["verdict"]), class_=f"verdict {kind}"),
            nums(signed(row["difference"], d), interval(row["low"], row["high"], d)),
            tag("td", charts.glyph(row["difference"], row["low"], row["high"], kind), class_="plot"),
            nums(number(row["base"], d), number(row["aligned"], d)),
            nums(f"{count(row['up'])} / {count(row['down'])} ({percent(row['win_rate'])})"),
            nums(p_value(row["sign_p"]), p_value(row["p_adjusted"]), count(row["n"])),
        ]
        lines.append(tag("tr", cells))
    return lines


def _floor(results: Mapping[str, Any], decimals: Mapping[str, int]) -> str:
    """What no alignment at all would score, where the run measured it."""
    floor = [f"{m} {number(x, decimals.get(m, 3))}" for m, x in results.get("floor", {}).items()]
    means = results.get("floor_means") or "pictures judged against the prompts of others"
    return f" Floor ({means}): {', '.join(floor)}." if floor else ""


def _distinct(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of a key, each once, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def _alone(results: Mapping[str, Any], decimals: Mapping[str, int]) -> Html:
    """Means of arms that are compared with nothing."""
    body = [
        tag(
            "tr",
            row_head(row["metric"]),
            tag("td", row["arm"]),
            nums(number(row["mean"], d), interval(row["low"], row["high"], d, sign=False), count(row["n"])),
        )
        for row in results["means"]
        if row["group"] is None
        for d in (decimals.get(row["metric"], 3),)
    ]
    head = ["Scorer", "Arm", *num_head("Mean", "95 % interval", "n")]
    floor = _floor(results, decimals).strip()
    words = tag("p", floor, class_="small") if floor else None
    return section("summary", "Summary", table(head, tag("tbody", body), caption="Summary"), words)


def _metrics(scorer: Mapping[str, Any]) -> list[str]:
    """The headline, then the others."""
    return [scorer["headline"], *(m for m in scorer["metrics"] if m != scorer["headline"])]


def official(results: Mapping[str, Any]) -> Html | None:
    """The numbers as the authors of the benchmark report them, where it has such a table."""
    rows = results.get("official")
    if not rows:
        return None
    body = [
        tag(
            "tr",
            row_head(row["metric"]),
            tag("td", row["arm"]),
            tag("td", row["label"]),
            nums(number(row["value"], 4), number(row["std"], 4), count(row["n"])),
            tag("td", row["how"], class_="lost"),
        )
        for row in rows
    ]
    head = ["Scorer", "Arm", "Part", *num_head("Value", "SD", "n"), "How"]
    title = "The benchmark's own table"
    return section("official", title, table(head, tag("tbody", body), caption=title, kind="wide"))


# Groups


def groups(results: Mapping[str, Any], decimals: Mapping[str, int]) -> Html | None:
    """Bars with intervals per group and metric: differences, or means where nothing was compared."""
    compared = bool(results["comparisons"])
    rows = [r for r in results["comparisons" if compared else "means"] if r["group"] is not None]
    metrics = [m for s in results["scorers"] for m in _metrics(s) if any(r["metric"] == m for r in rows)]
    if not metrics:
        return None
    names = list(dict.fromkeys(row["group"][0] for row in rows))
    figures = [
        _figure(results, name, metric, part, decimals.get(metric, 3), compared)
        for metric in metrics
        for name in names
        if (part := [r for r in rows if r["metric"] == metric and r["group"][0] == name])
    ]
    options = [tag("option", m, value=m) for m in metrics]
    pick = tag("label", "Scorer ", tag("select", options, id="chart-metric"), class_="field js")
    what = "Difference to " + results["baseline"] if compared else "Mean"
    words = tag(
        "p",
        f"{what} with its 95 % interval. A bar whose verdict is no gain and no loss is grey; "
        f"intervals of fewer than {MIN_CLUSTERS} {results['unit']} (n in brackets) are not to be trusted.",
        class_="small",
    )
    return section("groups", "By group", words, pick, figures)


def _figure(
    results: Mapping[str, Any],
    name: str,
    metric: str,
    rows: Sequence[Mapping[str, Any]],
    d: int,
    compared: bool,
) -> Html:
    """One chart: a table whose middle column is drawn."""
    value = "difference" if compared else "mean"
    ends = [(row[value], row["low"], row["high"]) for row in rows]
    scale = charts.difference_scale(ends)
    arms = compared_arms(results) if compared else [arm["name"] for arm in results["arms"]]
    several = len(arms) > 1
    lines = []
    for group in dict.fromkeys(row["group"][1] for row in rows):
        part = [row for arm in arms for row in rows if row["arm"] == arm and row["group"][1] == group]
        for i, row in enumerate(part):
            first = tag("th", group, scope="row", rowspan=len(part)) if i == 0 else None
            lines.append(_bar_row(row, first, scale, value, d, several, compared))
    top = [
        tag("th", name, scope="col"),
        tag("th", "Arm", scope="col") if several else None,
        tag("th", tag("span", "Chart", class_="sr"), scope="col", class_="plot"),
        *num_head("Difference" if compared else "Mean", "95 % interval"),
        *(num_head(results["baseline"], "arm" if several else arms[0]) if compared else []),
        *num_head("n"),
    ]
    blank = tag("td", colspan=2 if several else None)
    foot = tag("tr", blank, tag("td", charts.axis(scale), class_="plot"), tag("td", colspan=5), class_="axis")
    head = [cell for cell in top if cell is not None]
    drawn = table(head, tag("tbody", lines, foot), caption=f"{metric} by {name}", kind="bars")
    return tag("figure", tag("figcaption", f"{metric} by {name}"), drawn, class_="chart", data_metric=metric)


def _bar_row(
    row: Mapping[str, Any],
    first: Html | None,
    scale: charts.Scale,
    value: str,
    d: int,
    several: bool,
    compared: bool,
) -> Html:
    kind = verdict_kind(row["verdict"]) if compared else "plain"
    means = nums(number(row["base"], d), number(row["aligned"], d)) if compared else None
    note = tag("span", f" ({row['verdict']})", class_="sr") if compared else None
    n = count(row["n"]) if row["clusters"] >= MIN_CLUSTERS else f"({count(row['n'])})"
    return tag(
        "tr",
        first,
        tag("td", row["arm"], class_="arm") if several else None,
        tag("td", charts.bar(scale, row[value], row["low"], row["high"], kind), class_="plot"),
        tag("td", (signed if compared else number)(row[value], d), note, class_="num value"),
        nums(interval(row["low"], row["high"], d, sign=compared)),
        means,
        nums(n),
        class_="first" if first is not None else None,
    )


# Drift and tokens


def drift(results: Mapping[str, Any]) -> Html | None:
    """How far an arm's pictures went from the baseline's, whatever the scorers say."""
    if not results["drift"]:
        return None
    base = results["baseline"]
    head = [
        "Arm",
        *num_head("Feature distance", "Saturation", base, "Clipped pixels", base, "Diversity", base),
    ]
    body = [
        tag(
            "tr",
            row_head(row["arm"]),
            nums(number(row["feature_distance"], 4)),
            nums(number(row["saturation"], 4), number(row["saturation_base"], 4)),
            nums(percent(row["clipped"], 2), percent(row["clipped_base"], 2)),
            nums(number(row["diversity"], 4), number(row["diversity_base"], 4)),
        )
        for row in results["drift"]
    ]
    towers = ", ".join(dict.fromkeys(str(r["feature_of"]) for r in results["drift"] if r["feature_of"]))
    words = tag(
        "p",
        "A scorer can be pleased by pictures that got worse. Feature distance: between the pictures of an "
        f"arm and of {base}, same prompt and noise{f' (image features of {towers})' if towers else ''}. "
        "Diversity: between pictures of one prompt with different seeds; it needs two or more per prompt "
        f"(--per-prompt 2). Columns headed {base} hold its own value, for comparison.",
        class_="small",
    )
    return section(
        "drift", f"Drift from {base}", table(head, tag("tbody", body), caption="Drift", kind="wide"), words
    )


def audit(results: Mapping[str, Any]) -> Html | None:
    """How many prompts each tokenizer cut, and the words that were lost."""
    rows = results["audit"]
    if not rows:
        return None
    head = [
        "Reads prompts",
        "as",
        *num_head("Token limit", "Prompts cut", "of", "Share"),
        tag("th", tag("span", "Share drawn", class_="sr"), scope="col", class_="plot"),
    ]
    body = [
        tag(
            "tr",
            row_head(row["name"]),
            tag("td", _reads_as(row)),
            nums(count(row["limit"]), count(row["cut"]), count(row["of"]), percent(part, 1)),
            tag("td", charts.share(part), class_="plot"),
        )
        for row in rows
        for part in (row["cut"] / row["of"] if row["of"] else None,)
    ]
    cut = [row for row in rows if row["cut"]]
    words = (
        "Where a prompt is longer than the limit, its end is not read: a model cannot draw it and a scorer "
        "cannot judge it."
        if cut
        else "No prompt was cut: every tokenizer read all words."
    )
    lists = [_lost(row) for row in cut if row["examples"]]
    shown = table(head, tag("tbody", body), caption="Prompts that were cut")
    return section("tokens", "Token audit", shown, tag("p", words, class_="small"), lists)


def _reads_as(row: Mapping[str, Any]) -> str:
    """As what one reads, and for which arms if not for all."""
    return ", ".join([row["what"], *row["arms"]])


def _lost(row: Mapping[str, Any]) -> Html:
    """The words that one tokenizer lost, folded away."""
    examples = row["examples"][:EXAMPLES]
    more = row["cut"] - len(examples)
    body = [
        tag("tr", row_head(e["id"]), tag("td", _shorten(str(e["lost"])), class_="lost")) for e in examples
    ]
    note = tag("p", f"and {plural(more, 'more prompt')}", class_="small") if more > 0 else None
    reader = f"{row['name']} ({_reads_as(row)})" if row["arms"] else row["name"]
    title = f"Words that {reader} did not read ({plural(row['cut'], 'prompt')})"
    words = table(["Prompt", "Lost"], tag("tbody", body), caption=title)
    return tag("details", tag("summary", title), words, note)


def _shorten(text: str) -> str:
    rest = len(text) - LOST
    return text if rest <= 0 else f"{text[:LOST]}... ({rest:,} more characters)"


# Provenance


def provenance(results: Mapping[str, Any]) -> Html:
    """What it takes to get every number again."""
    command = shlex.join(str(word) for word in results["command"])
    copy = tag("button", "Copy", type="button", class_="js", id="copy", data_copies="command")
    facts = [
        tag("tr", row_head(key.replace("_", " ")), tag("td", _value(_readable(key, held)), class_="fact"))
        for key, held in results.items()
        if key not in SHOWN
    ]
    arms = [
        tag(
            "tr",
            row_head(arm["name"]),
            tag("td", _lines(arm["adapters"]) or "no adapter"),
            tag("td", _lines(arm["hashes"]) or NONE, class_="fact"),
            tag("td", ", ".join(arm["trained_on"]) or NONE),
        )
        for arm in results["arms"]
    ]
    keys = ("name", "version", "source", "preprocessing", "scale", "dtype", "weights")
    scorers = [
        tag("tr", row_head(s["name"]), [tag("td", s.get(key) or NONE, class_="fact") for key in keys[1:]])
        for s in results["scorers"]
    ]
    return section(
        "provenance",
        "Where every number comes from",
        tag("p", "All numbers of this page were made by one command:", class_="small"),
        tag("div", tag("pre", tag("code", command), id="command", tabindex=0), copy, class_="command"),
        tag("h3", "Scorers"),
        table([k.capitalize() for k in keys], tag("tbody", scorers), caption="Scorers", kind="wide"),
        tag("h3", "Arms"),
        table(["Arm", "Adapters", "SHA-256", "Trained on"], tag("tbody", arms), caption="Arms"),
        tag("h3", "Run"),
        table(["What", "Value"], tag("tbody", facts), caption="Run"),
    )


def _lines(texts: Iterable[object]) -> list[Html]:
    """One line each."""
    return [tag("div", str(text)) for text in texts]


def _readable(key: str, held: Any) -> Any:
    """Peak memory with a unit; all else as it is."""
    if key != "memory":
        return held
    return {name: f"{number(size / 2**20, 0)} MiB" for name, size in held.items()}


def _value(held: object) -> str:
    """A value of results.json on one line; the names of a dictionary stand before its values."""
    if isinstance(held, Mapping):
        return "; ".join(f"{key} {_value(inner)}" for key, inner in held.items()) or NONE
    if isinstance(held, list | tuple):
        return ", ".join(map(_value, held)) or NONE
    if isinstance(held, float):
        return NONE if finite(held) is None else f"{held:.6g}"
    return NONE if held is None else str(held)
