"""What an adapter costs in drawing: time beside the base model, on the same prompts, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence

from align_cli.evaluation.arms import Arm
from align_cli.evaluation.store import Item
from align_cli.models.base import BaseModel
from align_cli.sampling import sample
from align_cli.settings import SampleSettings

PICTURES, ROUNDS = 32, 3


def overheads(
    model: BaseModel, arms: Sequence[Arm], items: Sequence[Item], settings: SampleSettings
) -> dict[str, float]:
    """Arm -> its shortest time for the first PICTURES items over that of the first arm, which is the base.

    The arms take turns ROUNDS times, so that other work on the machine hits all alike.
    """
    part = items[:PICTURES]
    texts, seeds = [item.row.text for item in part], [item.seed for item in part]
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for arm in arms:
            with arm.at_work(model):
                begun = time.perf_counter()
                sample(model, texts, arm.drawing(settings), seeds)
                seconds = time.perf_counter() - begun
            best[arm.name] = min(seconds, best.get(arm.name, seconds))
    base = best[arms[0].name]
    return {name: seconds / base for name, seconds in best.items()}
