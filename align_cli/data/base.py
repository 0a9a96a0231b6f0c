"""What a dataset gives: examples, and how they become a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from align_cli.methods.base import Batch


@dataclass
class Example:
    """One training example. pixels (3, H, W) float32 in [-1, 1], None for prompts alone; id: dataset
    index.
    """

    prompt: str
    pixels: Tensor | None = None
    id: int = 0
    extra: dict[str, object] = field(default_factory=dict)


class Dataset(Protocol):
    """Examples by index; all randomness (which caption, ...) comes from the generator that is handed in."""

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; the same for the same state of `rng`. UserError if its file cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Identity of the data, saved beside the adapter."""
        ...


def collate(examples: list[Example]) -> Batch:
    """Stack examples into a batch; every key of `extra` becomes a list.

    Raises:
        ValueError: no examples, pixels in some only or of different sizes, other keys in `extra`.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    with_pixels = [e.pixels for e in examples if e.pixels is not None]
    if len(with_pixels) not in (0, len(examples)):
        raise ValueError("some examples of a batch have pixels and some have none")
    if len({tuple(x.shape) for x in with_pixels}) > 1:
        raise ValueError(
            f"pixels of one batch differ in size: {sorted({tuple(x.shape) for x in with_pixels})}"
        )
    keys = examples[0].extra.keys()
    if any(e.extra.keys() != keys for e in examples):
        raise ValueError("the examples of a batch have different keys in extra")
    extra = {key: [e.extra[key] for e in examples] for key in keys}
    pixels = torch.stack(with_pixels) if with_pixels else None
    return Batch([e.prompt for e in examples], pixels, [e.id for e in examples], extra)
