"""Dropout whose mask of a row depends on the row's place in the global batch, not on who computes it.

Letters: B rows of a tensor, world_size processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowDropout:
    """Each value is kept with probability 1 - p and then divided by 1 - p.

    A call draws one number from torch's global generator on the CPU, so that activation checkpointing, which
    restores that generator, replays the same mask; a row's mask is drawn from this number and the row's place
    in the batch of all processes, so that the number of processes changes nothing.

    rows: examples of this process; a tensor may hold several parts of so many rows each (classifier-free
    guidance has two). 0: the tensor is one part.
    """

    p: float
    rows: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.p}")

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, ...)."""
        call = int(torch.randint(2**62, ()))
        count = self.rows or len(x)
        mask = torch.empty_like(x, dtype=torch.bool)
        rng = torch.Generator(x.device)
        for i, row in enumerate(mask):
            part, place = divmod(i, count)
            rng.manual_seed(call + (part * self.world_size + self.rank) * count + place)
            row.bernoulli_(1 - self.p, generator=rng)
        return torch.where(mask, x, 0) / (1 - self.p)
