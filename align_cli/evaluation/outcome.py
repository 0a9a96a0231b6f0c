"""The outcome of an evaluation: results.json, from which the table, the CSV file and the report are made."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

import align_cli
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.audit import audit_words
from align_cli.evaluation.compare import Comparison, Design, Mean, Metric, compare, means
from align_cli.evaluation.guard import held_out, in_words
from align_cli.evaluation.official import official_results
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.scoring import Scorer
from align_cli.evaluation.store import RESULTS, TABLE, Item
from align_cli.files import file_errors, write_text

FORMAT = 1
REFERENCE = "-reference"
"""End of the name of an official package that scores beside our scorer."""
PACKAGES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Facts:
    """What an evaluation ran on, beside its prompts and arms; each goes into results.json as it is."""

    command: list[str]
    created: str
    model: dict[str, str]
    sample: dict[str, Any]
    seed: int
    per_prompt: int
    seconds: dict[str, float]
    memory: dict[str, int]
    protocol: dict[str, Any] | None
    notes: list[str]


def outcome(
    folder: Path,
    prompts: PromptSet,
    items: Sequence[Item],
    arms: Sequence[Arm],
    baseline: str,
    pictures: Mapping[str, Sequence[Path | None]],
    scored: Sequence[tuple[Scorer, Mapping[str, Mapping[str, Any]]]],
    design: Design,
    drift: Sequence[Mapping[str, object]],
    audit: Sequence[Mapping[str, object]],
    floor: Mapping[str, float],
    facts: Facts,
) -> dict[str, Any]:
    """The content of results.json, format 1.

    Args:
        folder: what the paths of pictures start from. scored: every scorer with metric -> arm -> (N,).
    """
    metrics = [
        Metric(key, scorer.name, key == scorer.headline, scorer.fraction)
        for scorer, values in scored
        for key in sorted(values, key=partial(eq, scorer.headline))  # the headline last
    ]
    values = {key: row for _, found in scored for key, row in found.items()}
    compared = compare(values, metrics, design)
    trained = {arm.name: arm.trained_on for arm in arms}
    notes = [*prompts.notes, *facts.notes]
    unit = "prompts" if prompts.scenes is None else "compositions"
    return plain({
        "format": FORMAT,
        "command": facts.command,
        "created": facts.created,
        "versions": {"t2ialign": align_cli.__version__, **{name: version(name) for name in PACKAGES}},
        "benchmark": {
            "name": prompts.name,
            "source": prompts.source,
            "prompts": len(prompts),
            "fingerprint": prompts.fingerprint,
            "group_names": prompts.group_names,
        },
        "model": facts.model,
        "seed": facts.seed,
        "per_prompt": facts.per_prompt,
        "sample": facts.sample,
        "seconds": {key: round(value, 2) for key, value in facts.seconds.items()},
        "memory": facts.memory,
        "arms": [
            {
                "name": arm.name,
                "adapters": list(arm.adapters),
                "hashes": list(arm.hashes),
                "trained_on": list(arm.trained_on),
            }
            for arm in arms
        ],
        "baseline": baseline,
        "interval": design.interval,
        "unit": unit,
        "scorers": [
            {
                **scorer.facts(),
                "headline": scorer.headline,
                "metrics": [m.name for m in metrics if m.scorer == scorer.name],
            }
            for scorer, _ in scored
        ],
        "audit": list(audit),
        "means": [mean_row(mean) for mean in means(values, metrics, design)],
        "comparisons": [comparison_row(c, (*trained[c.arm], *trained[baseline])) for c in compared],
        "drift": list(drift),
        "floor": dict(floor),
        "official": _official(prompts, items, arms, scored),
        "protocol": facts.protocol,
        "words": [
            *in_words(compared, baseline, trained, drift, unit), *audit_words(audit), *agreement(values),
        ],
        "notes": notes,
        "items": [
            _item(i, item, folder, pictures, values, drawn=bool(facts.sample)) for i, item in enumerate(items)
        ],
    })  # fmt: skip


def agreement(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far our scorers are from the official packages that scored beside them."""
    lines = []
    for name in values:
        twin = f"{name}{REFERENCE}"
        if twin in values:
            both = [abs(values[name][arm] - values[twin][arm]) for arm in values[name]]
            apart = np.concatenate([x[~np.isnan(x)] for x in both])
            lines.append(
                f"{name} differs from the official package by {apart.max():.2g} at most and "
                f"{apart.mean():.2g} on average, over {len(apart)} pictures"
            )
    return lines


def _official(
    prompts: PromptSet,
    items: Sequence[Item],
    arms: Sequence[Arm],
    scored: Sequence[tuple[Scorer, Mapping[str, Mapping[str, Any]]]],
) -> list[dict[str, Any]]:
    """The benchmark's own table for every arm, where it has one: not of scorers that see the pictures in
    another way than the benchmark's do.
    """
    rows = [item.number for item in items]
    return [
        {"arm": arm.name, "metric": key, **asdict(line)}
        for scorer, values in scored
        if not scorer.facts().get("preprocessing", "").startswith("textcraftor")
        for key, of in values.items()
        for arm in arms
        for line in official_results(prompts, key, rows, of[arm.name])
    ]


def mean_row(mean: Mean) -> dict[str, Any]:
    """The mean of an arm, as results.json has it."""
    e = mean.estimate
    return {
        "arm": mean.arm, "metric": mean.metric.name, "group": _group(mean.group), "mean": e.mean,
        "low": e.low, "high": e.high, "n": e.n, "clusters": e.clusters,
    }  # fmt: skip


def comparison_row(c: Comparison, trained_on: Sequence[str] = ()) -> dict[str, Any]:
    """As results.json has it. trained_on: scorers that either of the two arms was trained on."""
    row = c.row
    return {
        "arm": c.arm, "metric": c.metric.name, "headline": c.metric.headline, "group": _group(c.group),
        "base": row.base, "aligned": row.aligned, "difference": row.difference, "low": row.low,
        "high": row.high, "n": row.n, "clusters": row.clusters, "up": row.up, "down": row.down,
        "win_rate": row.win_rate, "sign_p": row.sign_p, "p": row.p, "p_adjusted": c.p_adjusted,
        "verdict": c.verdict, "held_out": held_out(c.metric.scorer, trained_on),
    }  # fmt: skip


def _group(group: tuple[str, str] | None) -> list[str] | None:
    return None if group is None else list(group)


def _item(
    i: int,
    item: Item,
    folder: Path,
    pictures: Mapping[str, Sequence[Path | None]],
    values: Mapping[str, Mapping[str, Any]],
    *,
    drawn: bool,
) -> dict[str, Any]:
    """One picture of every arm. drawn: by this run, so that its seed is known."""
    return {
        "id": item.row.id,
        "prompt": item.row.text,
        "groups": dict(item.row.groups),
        "k": item.k,
        "seed": item.seed if drawn else None,
        "images": {arm: _relative(paths[i], folder) for arm, paths in pictures.items()},
        "scores": {key: {arm: float(x[i]) for arm, x in row.items()} for key, row in values.items()},
    }


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else Path(os.path.relpath(path, folder)).as_posix()


def plain(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json and results.csv. UserError if they cannot be written."""
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with file_errors(f"cannot write {folder / RESULTS}", "make room, then go on with --resume"):
        write_text(folder / RESULTS, text)
        write_text(folder / TABLE, table(results))


def table(results: Mapping[str, Any]) -> str:
    """CSV: a line per picture, with a column per grouping and per metric, and for what else is said of it."""
    groups = results["benchmark"]["group_names"]
    metrics = [name for scorer in results["scorers"] for name in scorer["metrics"]]
    metrics += dict.fromkeys(m for item in results["items"] for m in item["scores"] if m not in metrics)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "k", "seed", "arm", "image", "prompt", *groups, *metrics])
    for item in results["items"]:
        for arm in (a["name"] for a in results["arms"]):
            scores = [item["scores"].get(name, {}).get(arm) for name in metrics]
            shared = [item["id"], item["k"], item["seed"], arm, item["images"][arm], item["prompt"]]
            writer.writerow([*shared, *(item["groups"].get(g, "") for g in groups), *scores])
    return out.getvalue()
