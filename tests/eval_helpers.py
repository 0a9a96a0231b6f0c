"""What tests of the evaluation share: a scorer that can be worked out by hand, small sets, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli.evaluation.arms import Arm
from align_cli.evaluation.engine import Evaluation, run
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.evaluation.store import Item, Store, make_items
from align_cli.pictures import save_png
from align_cli.rewards.base import Reward, rgb
from align_cli.training.distributed import Ranks

CPU = torch.device("cpu")


def quiet(_what: str, _more: int) -> None:
    """Progress that nobody looks at."""


class MeanRed(Reward):
    """The mean of the red channel; also `side`, asked only of prompts that begin with "wide". `seen` counts
    pictures; a picture that is all black has no number.
    """

    def __init__(self, name: str = "red", version: str = "1", black: float = 0.0) -> None:
        super().__init__(
            name=name, version=version, source="tests", preprocessing="none", scale="mean in [0, 1]"
        )
        self.seen, self.black = 0, black

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = rgb(images, prompts)
        self.seen += len(x)
        return torch.where(x.flatten(1).sum(1) == 0, self.black, x[:, 0].flatten(1).mean(1))

    def metrics(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        side = [float(images.shape[-1]) if p.startswith("wide") else float("nan") for p in prompts]
        return {f"{self.name}/side": torch.tensor(side), self.name: self.score(images, prompts)}

    def image_vectors(self, images: Tensor) -> Tensor:
        """Mean colour."""
        return images.flatten(2).mean(2)


def prompt_set(n: int = 12, name: str = "made", **options: Any) -> PromptSet:
    """`n` prompts in two groups; every third begins with "wide"."""
    rows = [
        PromptRow(f"p{i}", f"{'wide' if i % 3 == 0 else 'plain'} prompt {i}", {"Kind": "ab"[i % 2]})
        for i in range(n)
    ]
    return PromptSet(name, "tests", tuple(rows), **options)


def flat(red: float, other: float = 0.5, side: int = 8) -> np.ndarray:
    """A picture of one colour, (side, side, 3) uint8."""
    picture = np.full((side, side, 3), round(255 * other), np.uint8)
    picture[..., 0] = round(255 * red)
    return picture


def write_pictures(folder: Path, items: Sequence[Item], pictures: Sequence[np.ndarray]) -> list[Path | None]:
    """One PNG per item."""
    paths: list[Path | None] = []
    for item, picture in zip(items, pictures, strict=True):
        path = folder / f"{item.stem}.png"
        save_png(picture, path)
        paths.append(path)
    return paths


def measured(
    folder: Path,
    reds: Mapping[str, Sequence[float]],
    *,
    trained_on: Sequence[str] = (),
    baseline_trained_on: Sequence[str] = (),
    rewards: Sequence[Reward] | None = None,
    interval: str = "bootstrap",
    per_prompt: int = 1,
) -> dict[str, Any]:
    """results.json of given pictures: arm -> the red of every picture. The first arm is the baseline."""
    count = len(next(iter(reds.values())))
    prompts = prompt_set(count // per_prompt)
    items = make_items(prompts, per_prompt, 0)
    given = {arm: write_pictures(folder / arm, items, [flat(x) for x in x_of]) for arm, x_of in reds.items()}
    names = list(reds)
    job = Evaluation(
        prompts=prompts,
        arms=[
            Arm(name, trained_on=tuple(trained_on if name != names[0] else baseline_trained_on))
            for name in names
        ],
        baseline=names[0],
        rewards=[MeanRed()] if rewards is None else rewards,
        items=items,
        given=given,
        per_prompt=per_prompt,
        interval=interval,
        command=["t2ialign", "eval", "made"],
    )
    store = Store(folder / "out", {})
    store.begin(job.command, "now", resume=False, overwrite=False)
    return run(job, store, Ranks.alone(CPU), quiet)
