"""Numbers as the authors of a benchmark report them, beside our paired ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align_cli.evaluation.geneval import TASK
from align_cli.evaluation.prompts import PromptSet

HPSV2_GROUP = 80
"""Pictures whose mean is one of the numbers that the standard deviation is of."""


@dataclass(frozen=True)
class Official:
    """One number of an official table. std: where the table has one. n: pictures. how: in words."""

    label: str
    value: float
    std: float | None
    n: int
    how: str


def official_results(
    prompts: PromptSet, metric: str, rows: Sequence[int], values: np.ndarray
) -> list[Official]:
    """The official table of a benchmark from the scores of one model's pictures; empty where it has none.

    Args:
        metric: hpsv2 or hpsv2.1 on the hpsv2 benchmark; geneval/correct or geneval-shapes/correct.
        rows: N rows of the set that the pictures were drawn for. values: (N,), NaN for a missing picture.
    """
    order = np.argsort(np.asarray(rows), kind="stable")
    kept = [i for i in order if not np.isnan(values[i])]
    if prompts.name == "hpsv2" and metric in ("hpsv2", "hpsv2.1"):
        return hpsv2_table(values[kept], [prompts.rows[rows[i]].groups["Style"] for i in kept])
    if metric in ("geneval/correct", "geneval-shapes/correct"):
        return geneval_table(
            values[kept],
            [prompts.rows[rows[i]].groups[TASK] for i in kept],
            [json.dumps(prompts.rows[rows[i]].extra) for i in kept],
        )
    return []


def hpsv2_table(scores: np.ndarray, styles: Sequence[str]) -> list[Official]:
    """Each style's score times 100, and the average of all pictures.

    A style's pictures are cut in order into groups of 80, the last one perhaps shorter; its value is the
    mean, its std the population standard deviation, of the groups' means.

    Args:
        scores: (N,) cosines, in the order of the prompts. styles: N.
    Source: hpsv2 1.2.0, evaluation.py, evaluate_benchmark; the average over all pictures is new in 1.2.0.
    """
    table = []
    for style in dict.fromkeys(styles):
        own = 100 * scores[[s == style for s in styles]]
        means = [own[i : i + HPSV2_GROUP].mean() for i in range(0, len(own), HPSV2_GROUP)]
        how = f"100 x cosine, mean and population std of the means of {len(means)} groups of {HPSV2_GROUP}"
        table.append(Official(style, float(np.mean(means)), float(np.std(means)), len(own), how))
    if len(scores):
        how = "100 x cosine, mean over all pictures"
        table.append(Official("Average", 100 * float(scores.mean()), None, len(scores), how))
    return table


def geneval_table(correct: np.ndarray, tasks: Sequence[str], prompts: Sequence[str]) -> list[Official]:
    """Share of correct pictures of each task, the unweighted mean of the tasks, the share of all pictures,
    and the share of prompts with at least one correct picture.

    Args:
        correct: (N,) 0 or 1. tasks, prompts: N, of each picture; a prompt by its record, as there: two with
        the same record are one.
    Source: GenEval, summary_scores.py.
    """
    table = []
    for task in dict.fromkeys(tasks):
        own = correct[[t == task for t in tasks]]
        table.append(Official(task, float(own.mean()), None, len(own), "share of correct pictures"))
    if not table:
        return []
    overall = float(np.mean([row.value for row in table]))
    solved = {p for p, c in zip(prompts, correct, strict=True) if c}
    return [
        *table,
        Official("Overall", overall, None, len(correct), f"unweighted mean of {len(table)} tasks"),
        Official("pictures", float(correct.mean()), None, len(correct), "share of all pictures"),
        Official(
            "prompts", len(solved) / len(set(prompts)), None, len(correct), "share with a correct picture"
        ),
    ]
