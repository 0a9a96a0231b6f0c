"""One batch of a training run: of its data where they are there, else of the shapes that settings tell."""

from __future__ import annotations

import torch

from align_cli import config
from align_cli.data.base import collate
from align_cli.data.grounded import Grounded
from align_cli.data.training import open_data
from align_cli.errors import UserError
from align_cli.methods.base import Batch
from align_cli.models.base import BaseModel, Posterior
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
        picture = torch.zeros(3, side, side)
        extra: dict[str, list[object]] = {"negatives": [[PROMPT] * 8] * count}
        if resolved.method_config.grounded:
            told = Grounded(
                PROMPT,
                torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
                [[(0, 7)]],
                PROMPT,
                PROMPT,
                picture,
                picture,
                (side, side),
            )
            extra["grounded"] = [told] * count
        batch = Batch(prompts=[PROMPT] * count, ids=list(range(count)), extra=extra)
        if resolved.method_config.pictures:
            batch.pixels = picture.repeat(count, 1, 1, 1)
        if resolved.method_config.latents:
            side = getattr(resolved.method_config, "image_size", 0) or model.image_size
            shape = (count, model.latent_channels, side // model.vae_factor, side // model.vae_factor)
            batch.latents = Posterior(torch.zeros(shape), None, 1.0)
        return batch, [f"the data are not there, a batch of their size is assumed ({error})"]
