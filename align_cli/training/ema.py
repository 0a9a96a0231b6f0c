"""Exponential moving average of the trained tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of parameters with a warmed-up decay: min(decay, (1 + n) / (10 + n)) at update n.

    Source of the warm-up: tf.train.ExponentialMovingAverage(num_updates), also used by diffusers' EMAModel.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for mean, p in zip(self.average, self.parameters, strict=True):
            mean.lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their average."""
        for mean, p in zip(self.average, self.parameters, strict=True):
            p.copy_(mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the parameters inside the `with` block."""
        raw = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, raw, strict=True):
                    p.copy_(value)

    def state(self) -> dict[str, int | list[Tensor]]:
        """For a checkpoint."""
        return {"updates": self.updates, "average": [m.cpu() for m in self.average]}

    def load_state(self, updates: int, average: list[Tensor]) -> None:
        """Inverse of `state`."""
        self.updates = updates
        for mean, value in zip(self.average, average, strict=True):
            mean.copy_(value)
