"""What an alignment method is, and what the training loop gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from align_cli.models.base import BaseModel
from align_cli.settings import TrainSettings


@dataclass
class Batch:
    """This process's share of one training batch; B examples.

    pixels: (B, 3, H, W) float32 in [-1, 1], or None for methods that train on prompts alone.
    prompts: B captions. ids: B dataset indices. extra: lists of length B for methods that need more (boxes,
    negatives).
    """

    prompts: list[str]
    pixels: Tensor | None = None
    ids: list[int] = field(default_factory=list)
    extra: dict[str, list[object]] = field(default_factory=dict)


@dataclass
class StepContext:
    """What a method may use in one step.

    rng is freshly seeded from (run seed, step, accumulation slice), identical on every rank: a method draws
    for the global batch of `world_size * B` rows and takes its own rows with `rows`, so the number of
    processes changes nothing.
    backward(loss, group) may be called many times; the loop averages gradients over ranks once per optimiser
    step.
    gather(x) concatenates x of all ranks on dim 0, in rank order; gradients flow to this rank's own rows
    only.
    """

    step: int
    rng: torch.Generator
    backward: Callable[..., None]
    gather: Callable[[Tensor], Tensor] = lambda x: x
    rank: int = 0
    world_size: int = 1

    def rows(self, global_rows: Tensor) -> Tensor:
        """This rank's equal share of the rows of `global_rows`."""
        return global_rows.chunk(self.world_size)[self.rank]


class Method(Protocol):
    """One alignment method. The loop owns devices, precision, steps and files; a method owns its maths."""

    name: ClassVar[str]
    config_class: ClassVar[type]
    families: ClassVar[frozenset[str]]

    model: BaseModel
    """The base model that it was made for."""

    def __init__(self, model: BaseModel, config: object, *, seed: int = 0) -> None: ...

    def check(self, settings: TrainSettings) -> None:
        """UserError for settings of the loop that this method cannot work with; called before anything is
        written.
        """
        ...

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """Group name -> parameters; a group has its own optimiser. Trained tensors are float32."""
        ...

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, float]:
        """One forward/backward on one batch slice. Returns plain floats to log, keyed
        "<group>/<quantity>".
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Only what was trained: CPU, contiguous."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """ValueError naming missing, unused and wrongly shaped keys."""
        ...

    def attach(self, model: BaseModel, scale: float = 1.0) -> AbstractContextManager[None]:
        """The adapter at work on `model` inside the `with` block; the model is untouched afterwards."""
        ...
