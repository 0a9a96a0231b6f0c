"""Dropout whose mask of a row depends on the row's place in the global batch, not on who computes it.

Letters: B rows of a tensor, world_size processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PER_WORD, LEVELS = 4, 2**15
"""Random numbers that are taken from one of 63 bits, and how many values each has: p is met to 1 / LEVELS."""


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
        count, size = self.rows or len(x), x[0].numel()
        bits = x.new_empty(len(x), -(-size // PER_WORD), dtype=torch.int64)
        rng = torch.Generator(x.device)
        for i, row in enumerate(bits):
            part, place = divmod(i, count)
            rng.manual_seed(call + (part * self.world_size + self.rank) * count + place)
            row.random_(generator=rng)  # 63 bits
        levels = (bits.view(torch.int16) & (LEVELS - 1))[:, :size].view(x.shape)
        return torch.where(levels >= round(self.p * LEVELS), x, 0) / (1 - self.p)
