"""One batch of a training run: of its data where they are there, else of the shapes that settings tell."""

from __future__ import annotations

import torch

from align_cli import config
from align_cli.cli.train_data import open_data
from align_cli.data.base import collate
from align_cli.errors import UserError
from align_cli.methods.base import Batch
from align_cli.models.base import BaseModel
from align_cli.training.order import item_rng

PROMPT = "a photo of a red apple on a wooden table beside a blue cup"


def planned_batch(resolved: config.Resolved, model: BaseModel) -> tuple[Batch, list[str]]:
    """The batch of all processes, and what had to be assumed."""
    count = resolved.train.batch_size
    try:
        dataset = open_data(resolved)
        n = len(dataset)
        return collate([dataset.get(i % n, item_rng(resolved.train.seed, 0, i)) for i in range(count)]), []
    except UserError as error:
        side = resolved.data.image_size
        pixels = torch.zeros(count, 3, side, side) if resolved.method_config.pictures else None
        prompts = [PROMPT] * count
        negatives: list[object] = [[PROMPT] * 8] * count
        said = f"the data are not there ({error}): a batch of their size is assumed"
        return Batch(prompts=prompts, pixels=pixels, ids=list(range(count)), extra={"negatives": negatives}), [said]
