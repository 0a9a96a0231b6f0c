"""What a dataset gives: examples, and how they become a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from align_cli.methods.base import Batch
from align_cli.models.base import BaseModel, Posterior, TextCond

T = TypeVar("T")


@dataclass
class Example:
    """One training example. pixels (3, H, W) float32 in [-1, 1], None for prompts alone; id: dataset
    index. latents (C, h, w), text (L, D): encodings that were computed beforehand.
    """

    prompt: str
    pixels: Tensor | None = None
    id: int = 0
    extra: dict[str, object] = field(default_factory=dict)
    latents: Posterior | None = None
    text: TextCond | None = None


class Dataset(Protocol):
    """Examples by index; all randomness (which caption, ...) comes from the generator that is handed in.

    Built as `cls(settings, *, seed, split, pictures)`; with pictures False none is looked for or read, and
    the examples are the same without pixels.
    """

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; the same for the same state of `rng`. UserError if its file cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Identity of the data, saved beside the adapter."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A dataset that was made with a model, and fits others like it alone."""

    def check_model(self, model: BaseModel) -> None:
        """UserError if the examples are not for `model`."""
        ...


@runtime_checkable
class Captioned(Protocol):
    """A dataset whose captions can be listed. ids: of the examples in their source, empty for none."""

    ids: list[int]

    def captions_of(self, index: int) -> list[str]:
        """The captions that example `index` may have."""
        ...


def draw_caption(captions: Sequence[object], rng: np.random.Generator) -> int:
    """Which caption of an example an epoch takes: one of them at random. The first use of `rng` in `get`."""
    return int(rng.integers(len(captions)))


def collate(examples: list[Example]) -> Batch:
    """Stack examples into a batch; every key of `extra` becomes a list.

    Raises:
        ValueError: no examples, pixels in some only or of different sizes, other keys in `extra`.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    pixels = _stacked("pixels", [e.pixels for e in examples])
    latents = _alike("latents", [e.latents for e in examples])
    text = _alike("text", [e.text for e in examples])
    keys = examples[0].extra.keys()
    if any(e.extra.keys() != keys for e in examples):
        raise ValueError("the examples of a batch have different keys in extra")
    extra = {key: [e.extra[key] for e in examples] for key in keys}
    return Batch(
        prompts=[e.prompt for e in examples],
        pixels=pixels,
        ids=[e.id for e in examples],
        extra=extra,
        latents=_posterior(latents) if latents else None,
        text=_text(text) if text else None,
    )


def _alike(what: str, values: Sequence[T | None]) -> list[T]:
    """All values, or none if none is there."""
    there = [x for x in values if x is not None]
    if len(there) not in (0, len(values)):
        raise ValueError(f"some examples of a batch have {what} and some have none")
    return there


def _stacked(what: str, values: Sequence[Tensor | None]) -> Tensor | None:
    there = _alike(what, values)
    if len({tuple(x.shape) for x in there}) > 1:
        raise ValueError(f"{what} of one batch differ in size: {sorted({tuple(x.shape) for x in there})}")
    return torch.stack(there) if there else None


def _posterior(rows: list[Posterior]) -> Posterior:
    mean, std = _stacked("latents", [r.mean for r in rows]), _stacked("latents", [r.std for r in rows])
    assert mean is not None
    return Posterior(mean, std, rows[0].scale, rows[0].shift)


def _text(rows: list[TextCond]) -> TextCond:
    tokens = _stacked("text", [r.tokens for r in rows])
    assert tokens is not None
    pooled = _stacked("pooled text", [r.pooled for r in rows])
    return TextCond(tokens, pooled, _stacked("sizes", [r.time_ids for r in rows]))
