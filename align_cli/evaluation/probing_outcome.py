"""The outcome of probing: results.json in the form of an evaluation's, with the pictures of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import align_cli
from align_cli.evaluation.compare import Comparison, Design, Mean, Metric, compare, means
from align_cli.evaluation.outcome import FORMAT, PACKAGES, comparison_row, mean_row, plain
from align_cli.evaluation.probing import (
    SCORES,
    Probed,
    chance,
    measure,
    metrics,
    ties,
)
from align_cli.evaluation.store import IMAGES
from align_cli.grounding.boxes import to_corners
from align_cli.pictures import save_png

NAME = "dpt-probe"
SIDE = 128
"""Pixels to which smaller pictures are enlarged before boxes are drawn on them."""
TRUE, GUESS, EDGE = (255, 255, 255), (255, 0, 200), (0, 0, 0)
"""Colours of the true boxes, of the best one, and around both."""
GUESSING = "guessing: a coin for matching, any candidate for retrieval, boxes of other items for grounding"


@dataclass(frozen=True)
class Arm:
    """A discriminator that was asked. spec: "PATH" or "PATH@SCALE". sha256: of its tensors. model: facts of
    its base model. timestep: at which it was asked.
    """

    name: str
    spec: str
    sha256: str
    model: dict[str, str]
    timestep: int
    probed: Probed


def outcome(
    arms: Sequence[Arm],
    folder: Path,
    *,
    seed: int,
    data: Mapping[str, Any],
    interval: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of results.json, format 1; and the pictures of the first items, with boxes, into `folder`.

    Args:
        arms: the others are compared with the first; all were asked about the same items. data: name, source
        and fingerprint of the dataset. facts: command, created, seconds, memory.
    Raises:
        UserError: a picture cannot be written.
    """
    first = arms[0].probed
    items = first.items
    kinds = metrics(retrieval=bool(first.galleries))
    by_arm = {arm.name: measure(arm.probed) for arm in arms}
    values = {m.name: {name: found[m.name] for name, found in by_arm.items()} for m in kinds}
    design = Design(
        arms=tuple(by_arm),
        baseline=arms[0].name,
        clusters=[item.picture for item in items],
        groups=[{} for _ in items],
        present={name: np.ones(len(items), bool) for name in by_arm},
        interval=interval,
        seed=seed,
    )
    averages, compared = means(values, kinds, design), compare(values, kinds, design)
    pictures = {arm.name: _draw(arm, folder) for arm in arms}
    found = {
        "format": FORMAT,
        **{key: facts[key] for key in ("command", "created")},
        "versions": {"t2ialign": align_cli.__version__, **{name: version(name) for name in PACKAGES}},
        "benchmark": {"name": NAME, **data, "prompts": len(items), "group_names": []},
        "model": _models(arms),
        "seed": seed,
        "per_prompt": 1,
        "sample": {},
        **{key: facts[key] for key in ("seconds", "memory")},
        "gallery": len(first.galleries[0]) if first.galleries else 0,
        "arms": [
            {"name": arm.name, "adapters": [arm.spec], "hashes": [arm.sha256], "trained_on": []}
            for arm in arms
        ],
        "models": {arm.name: {**arm.model, "timestep": arm.timestep} for arm in arms},
        "baseline": arms[0].name,
        "interval": interval,
        "unit": "pictures",
        "scorers": _scorers(kinds),
        "means": [mean_row(mean) for mean in averages],
        "comparisons": [comparison_row(c) for c in compared],
        "floor": chance(first),
        "floor_means": GUESSING,
        "words": _words(averages, compared, chance(first)),
        "notes": _notes(arms),
        "items": [
            {
                "id": str(item.index),
                "prompt": item.caption + (f" [boxes: {item.expression}]" if len(item.boxes) else ""),
                "groups": {},
                "k": 0,
                "seed": None,
                "images": {name: paths[i] if i < len(paths) else None for name, paths in pictures.items()},
                "scores": _item_scores(i, arms, values),
            }
            for i, item in enumerate(items)
        ],
        "audit": [],
        "drift": [],
        "official": [],
        "protocol": None,
    }
    return dict(plain(found))


def shown(results: Mapping[str, Any]) -> dict[str, Any]:
    """The same with those items alone that have pictures: what the report is made of."""
    return {**results, "items": [item for item in results["items"] if all(item["images"].values())]}


def _models(arms: Sequence[Arm]) -> dict[str, str]:
    """Facts of all base models in one."""
    return {
        key: ", ".join(dict.fromkeys(arm.model[key] for arm in arms))
        for key in ("id", "family", "dtype", "device")
    }


def _scorers(kinds: Sequence[Metric]) -> list[dict[str, Any]]:
    """The kinds of questions, as results.json names scorers."""
    heads = {m.scorer: m.name for m in kinds if m.headline}
    empty = dict.fromkeys(("version", "source", "preprocessing", "scale", "dtype", "weights"), "")
    return [
        {"name": kind, **empty, "headline": head, "metrics": [m.name for m in kinds if m.scorer == kind]}
        for kind, head in heads.items()
    ]


def _item_scores(
    i: int, arms: Sequence[Arm], values: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, float]]:
    """Metric -> arm -> value of item i, and the scores of its pairs."""
    found = {key: {name: float(x[i]) for name, x in row.items()} for key, row in values.items()}
    for k, key in enumerate(SCORES):
        found[key] = {arm.name: float(arm.probed.scores[i, k]) for arm in arms}
    return found


def _words(averages: Sequence[Mean], compared: Sequence[Comparison], floor: Mapping[str, float]) -> list[str]:
    """One line per headline and arm."""
    lines = [
        f"{m.arm}: {m.metric.name} {m.estimate.mean:.3f} [{m.estimate.low:.3f}, {m.estimate.high:.3f}]; "
        f"guessing gives {floor[m.metric.name]:.3f}"
        for m in averages
        if m.metric.headline
    ]
    return lines + [
        f"{c.arm}: {c.verdict}, {c.metric.name} {c.row.difference:+.3f} [{c.row.low:+.3f}, {c.row.high:+.3f}]"
        for c in compared
        if c.metric.headline
    ]


def _notes(arms: Sequence[Arm]) -> list[str]:
    probed = arms[0].probed
    notes = []
    for arm in arms:
        if equal := ties(arm.probed):
            notes.append(f"{arm.name}: {equal} pairs with hard negatives are ties, which count half")
    if len({arm.timestep for arm in arms}) > 1:
        each = ", ".join(f"{arm.name} {arm.timestep}" for arm in arms)
        notes.append(f"asked at different timesteps, each as it was set up (dpt.eval_timestep): {each}")
    if probed.galleries and (rest := len(probed.items) - sum(map(len, probed.galleries))):
        size = len(probed.galleries[0])
        notes.append(f"{rest} items are left out of retrieval: galleries are of {size} items each")
    asked = np.isfinite(probed.scores[:, 0]).sum(), sum(len(item.boxes) > 0 for item in probed.items)
    if min(asked) < len(probed.items):
        notes.append(
            f"of {len(probed.items)} items, {asked[0]} are for matching and {asked[1]} for grounding"
        )
    return notes


# ---------------------------------------------------------------- pictures


def _draw(arm: Arm, folder: Path) -> list[str]:
    """Paths, from `folder` on, of the first items' pictures with true boxes and the best one."""
    paths = []
    for i, picture in enumerate(arm.probed.pictures):
        item = arm.probed.items[i]
        path = folder / IMAGES / arm.name / f"{i:05d}.png"
        drawn = with_boxes(picture, item.boxes, arm.probed.boxes[i][:1])
        save_png(drawn, path, {"caption": item.caption, "expression": item.expression, "arm": arm.name})
        paths.append(path.relative_to(folder).as_posix())
    return paths


def with_boxes(picture: np.ndarray, true: Tensor, guess: Tensor) -> np.ndarray:
    """The picture (H, W, 3) uint8, enlarged if it is small, with boxes (T, 4) and (K, 4) of centres and sizes
    relative to it: true ones white, the others pink.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    factor = max(1, SIDE // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    scale = torch.tensor([image.width, image.height] * 2)
    for boxes, colour in ((true, TRUE), (guess, GUESS)):
        for corners in (to_corners(boxes) * scale).round().int().tolist():
            x0, y0, x1, y1 = corners
            pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=EDGE)
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
    return np.asarray(image)
