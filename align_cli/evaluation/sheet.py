"""The before/after picture: one PNG with prompts and what the arms drew for them, not picked by result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cli.evaluation.benchmarks import verdict_note, wrong
from align_cli.evaluation.store import read_picture
from align_cli.pictures import Note, contact_sheet

NUM_EXAMPLES = 9
"""Rows of the picture."""


def save_sheet(results: Mapping[str, Any], folder: Path, path: Path) -> None:
    """The first prompts of each value of the first grouping.

    Args:
        results: the content of results.json. folder: what the paths of its pictures start from.
    Raises:
        UserError: a picture cannot be read, or the file cannot be written.
    """
    arms = [arm["name"] for arm in results["arms"]]
    names = results["benchmark"]["group_names"]
    whole = [item for item in results["items"] if item["k"] == 0 and all(item["images"].values())]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for item in whole:
        kinds.setdefault(item["groups"].get(names[0], "") if names else "", []).append(item)
    longest = max(map(len, kinds.values()), default=0)
    chosen = [of[k] for k in range(longest) for of in kinds.values() if k < len(of)][:NUM_EXAMPLES]
    source = results["benchmark"]["source"]
    contact_sheet(
        [[read_picture(folder / item["images"][arm]) for arm in arms] for item in chosen],
        [item["prompt"] for item in chosen],
        path,
        headers=arms if len(arms) > 1 else [results["model"]["id"]],
        notes=[[_note(results, item, arm) for arm in arms] for item in chosen] if results["scorers"] else (),
        title=f"{results['model']['id']}, {source}: first prompts of each group, not picked by result",
    )


def _note(results: Mapping[str, Any], item: Mapping[str, Any], arm: str) -> Note:
    """Shapes world: what is wrong with a picture; else its headline scores."""
    scores = item["scores"]
    if "shapes/all" in scores:
        values = {key.partition("/")[2]: row[arm] for key, row in scores.items() if key.startswith("shapes/")}
        return verdict_note(wrong(values))
    heads = [scorer["headline"] for scorer in results["scorers"]]
    return Note(", ".join(f"{key} {scores[key][arm]:.3f}" for key in heads if scores[key][arm] is not None))
