"""GenEval's exact twin: the six tasks on the shapes world, judged by the oracle. No detector, no weights.

A record has the official form; its classes are the three shapes. Every caption of the world names a colour
and a shape, so the record says which of them a task asks for, as GenEval does: single_object, two_object and
counting ask for shapes alone, colors and color_attr for the colours too, position for the relation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, permutations, product
from typing import Any

import numpy as np

from align_cli.errors import UserError
from align_cli.evaluation.geneval import TASK, TASKS
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.evaluation.sets import SetOptions
from align_cli.shapes.captions import NUMBERS, RELATIONS, Prompt, parse
from align_cli.shapes.oracle import Blobs, find, relation_holds
from align_cli.shapes.world import BACKGROUNDS, COLORS, KINDS, SHAPES, SIZE, SPLITS, Kind, kind_table

PROMPTS = 216
"""Prompts where `--n` is not given: 36 of each task."""
METRIC = "geneval-shapes/correct"

Found = tuple[str, str, float, float]
"""Colour, shape ("" if unknown) and centre x, y in pixels of an object of a picture."""


def geneval_shapes(options: SetOptions) -> PromptSet:
    """`--n` prompts in all, as many of each task as there are different ones; pairs are of `--split`.

    A row's id, groups and record are those of `geneval.geneval`.
    """
    options.check("geneval-shapes", "num", "split")
    split, num = options.split or "test", PROMPTS if options.num is None else options.num
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} (known: {', '.join(SPLITS)})")
    if num < len(TASKS):
        raise UserError(
            f"geneval-shapes has {len(TASKS)} tasks and needs at least as many prompts, got {num}"
        )
    rng = np.random.default_rng([options.seed, 70])
    rows: list[PromptRow] = []
    for i, task in enumerate(TASKS):
        every = list(_records(task, split))
        share = num // len(TASKS) + (i < num % len(TASKS))
        for j in rng.permutation(len(every))[:share]:
            rows.append(PromptRow(f"{len(rows):05d}", every[j]["prompt"], {TASK: task}, every[j]))
    kind = {"single_object": "single", "colors": "single", "counting": "count"}
    scenes = tuple(Prompt(r.text, parse(r.text), kind.get(r.groups[TASK], "pair")) for r in rows)
    source = f"GenEval's tasks on the shapes world, {split} split, seed {options.seed}"
    return PromptSet("geneval-shapes", source, tuple(rows), scenes, judge, METRIC, SIZE)


def judge(pictures: np.ndarray, rows: Sequence[PromptRow]) -> dict[str, np.ndarray]:
    """1 for every picture of which the record of its row is true, else 0; pictures (N, 32, 32, 3) uint8."""
    if len(pictures) != len(rows):
        raise ValueError(f"{len(pictures)} pictures but {len(rows)} prompts")
    blobs = find(pictures)
    return {METRIC: np.array([float(correct(row.extra, _of(blobs, i))) for i, row in enumerate(rows)])}


def correct(record: Any, objects: Sequence[Found]) -> bool:
    """Is the record true of a picture with these objects?

    Every `include` clause must hold: enough objects of the class, of the colour if one is given; with a
    position, one of them stands so to an object of the clause it names. No `exclude` clause may: fewer
    objects of the class than its count.

    Source: GenEval's evaluate_images.py. Deviations: the detector's most confident objects decide there; the
    oracle knows no confidence, so any will do. A relation holds where the shapes world says so (the offset of
    the centres dominates), without GenEval's threshold on boxes.
    """
    groups: list[list[Found]] = []
    for clause in record["include"]:
        group = [o for o in objects if o[1] == clause["class"] and clause.get("color", o[0]) == o[0]]
        if len(group) < clause["count"]:
            return False
        if "position" in clause:
            relation, target = clause["position"]
            group = [
                a for a in group
                if any(relation_holds(relation, a[2] - b[2], a[3] - b[3]) for b in groups[target])
            ]  # fmt: skip
            if not group:
                return False
        groups.append(group)
    return all(
        sum(o[1] == clause["class"] for o in objects) < clause["count"]
        for clause in record.get("exclude", [])
    )


def _of(blobs: Blobs, image: int) -> list[Found]:
    """The objects of one picture."""
    names = list(COLORS)
    return [
        (names[blobs.color[m]], SHAPES[blobs.shape[m]] if blobs.shape[m] >= 0 else "", blobs.x[m], blobs.y[m])
        for m in np.nonzero(blobs.image == image)[0]
    ]


def _records(task: str, split: str) -> Iterator[dict[str, Any]]:
    """Every record of a task, in a fixed order."""
    grounds = ["", *(f" on a {name} background" for name in BACKGROUNDS)]
    for ground in grounds:
        for text, clauses in _forms(task, split):
            yield {"tag": task, **clauses, "prompt": text + ground}


def _forms(task: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(caption, clauses) of every record of a task, without backgrounds."""
    if task in ("single_object", "colors"):
        for kind in KINDS:
            yield _name(kind), {"include": [_clause(kind, color=task == "colors")]}
        return
    if task == "counting":
        for kind, (number, word) in product(KINDS, NUMBERS.items()):
            clause = {"class": kind[1], "count": number}
            yield (
                f"{word} {' '.join(kind)}s",
                {"include": [clause], "exclude": [{"class": kind[1], "count": number + 1}]},
            )
        return
    pairs = chain.from_iterable(permutations(pair) for pair in kind_table("pair", split))
    for first, second in pairs:
        if first[1] == second[1] or (task == "color_attr" and first[0] == second[0]):
            continue  # as in GenEval: two classes, and two colours where colours are asked
        if task == "position":
            for relation in RELATIONS:
                target = {"class": first[1], "count": 1, "position": [relation, 0]}
                text = f"{_name(first)} {relation} {_name(second)}"
                yield text, {"include": [_clause(second), target]}
        else:
            colored = task == "color_attr"
            clauses = [_clause(first, color=colored), _clause(second, color=colored)]
            yield f"{_name(first)} and {_name(second)}", {"include": clauses}


def _name(kind: Kind) -> str:
    return f"a {kind[0]} {kind[1]}"


def _clause(kind: Kind, *, color: bool = False) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": kind[1], "count": 1}
    return {**clause, "color": kind[0]} if color else clause
