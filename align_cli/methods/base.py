"""What an alignment method is, and what the training loop gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.models.base import BaseModel, Posterior, TextCond
from align_cli.settings import TrainSettings

T = TypeVar("T")


@dataclass
class Batch:
    """This process's share of one training batch; B examples.

    pixels: (B, 3, H, W) float32 in [-1, 1], or None for methods that train on prompts alone.
    prompts: B captions. ids: B dataset indices. extra: lists of length B for methods that need more (boxes,
    negatives). latents, text: encodings that were computed beforehand, in place of pixels and of encoding
    the prompts; `encoded_latents` and `encoded_text` take what is there.
    """

    prompts: list[str]
    pixels: Tensor | None = None
    ids: list[int] = field(default_factory=list)
    extra: dict[str, list[object]] = field(default_factory=dict)
    latents: Posterior | None = None
    text: TextCond | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed: pinned, on another device, ..."""

        def each(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        latents, text = self.latents, self.text
        if latents is not None:
            latents = replace(latents, mean=change(latents.mean), std=each(latents.std))
        if text is not None:
            text = TextCond(change(text.tokens), each(text.pooled), each(text.time_ids))
        return replace(self, pixels=each(self.pixels), latents=latents, text=text)


def latent_shape(model: BaseModel, batch: Batch) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a batch with pictures or with latents.

    Raises:
        UserError: it has captions only.
    """
    if batch.latents is not None:
        channels, height, width = batch.latents.mean.shape[1:]
        return channels, height, width
    if batch.pixels is None:
        raise UserError("this method trains on images with captions, but the dataset has captions only")
    height, width = (n // model.vae_factor for n in batch.pixels.shape[-2:])
    return model.latent_channels, height, width


@torch.no_grad()
def encoded_latents(model: BaseModel, batch: Batch, noise: Tensor | None) -> Tensor:
    """Scaled latents (B, C, h, w), drawn from the stored posterior or from that of the pixels.

    noise: (B, C, h, w) of N(0, 1), None for the mean. The frozen autoencoder runs in its own precision, not
    under autocast, so that both ways give the same bits.
    """
    with torch.autocast(model.device.type, enabled=False):
        if batch.latents is not None:
            return batch.latents.draw(noise)
        if batch.pixels is None:
            raise ValueError("a batch without pixels and without latents")
        return model.encode_image(batch.pixels, noise)


@torch.no_grad()
def encoded_text(model: BaseModel, batch: Batch, more: Sequence[str] = ()) -> TextCond:
    """The batch's prompts and then `more`, (B + len(more), L, D); stored encodings are taken where they are.

    The frozen text encoders run in their own precision, not under autocast, as in `encoded_latents`.
    """
    with torch.autocast(model.device.type, enabled=False):
        if batch.text is None:
            return model.encode_text([*batch.prompts, *more])
        return TextCond.cat([batch.text, model.encode_text(list(more))]) if more else batch.text


@dataclass
class StepContext:
    """What a method may use in one step.

    rng is freshly seeded from (run seed, step, accumulation slice), identical on every rank: a method draws
    for the global batch of `world_size * B` rows and takes its own rows with `rows`, so the number of
    processes changes nothing.
    backward(loss, group) may be called many times; the loop averages gradients over ranks once per optimiser
    step.
    loss_scale: factor that keeps float16 gradients in range, 1 without fp16. `backward` applies it; a method
    needs it only where it takes gradients itself.
    gather(x) concatenates x of all ranks on dim 0, in rank order; gradients flow to this rank's own rows
    only.
    """

    step: int
    rng: torch.Generator
    backward: Callable[..., None]
    gather: Callable[[Tensor], Tensor] = lambda x: x
    rank: int = 0
    world_size: int = 1
    loss_scale: float = 1.0

    def rows(self, global_rows: Tensor) -> Tensor:
        """This rank's equal share of the rows of `global_rows`."""
        return global_rows.chunk(self.world_size)[self.rank]

    def together(self, work: Callable[[], T], device: torch.device) -> T:
        """What `work` returns; a UserError of one process stops all, so that none waits for one that is gone.
        device: of what is gathered.
        """
        if self.world_size == 1:
            return work()
        found, error = None, None
        try:
            found = work()
        except UserError as caught:
            error = caught
        failed = self.gather(torch.tensor([float(error is not None)], device=device)).nonzero()
        if error is not None:
            raise error
        if len(failed):
            raise UserError(f"process {int(failed[0])} stopped, for the reason that it says")
        return cast("T", found)


class Method(Protocol):
    """One alignment method. The loop owns devices, precision, steps and files; a method owns its maths."""

    name: ClassVar[str]
    config_class: ClassVar[type]
    families: ClassVar[frozenset[str]]

    model: BaseModel
    """The base model that it was made for."""

    def __init__(self, model: BaseModel, config: object, *, seed: int = 0) -> None: ...

    def check(self, settings: TrainSettings) -> None:
        """Called before training, and before anything is written: UserError for settings of the loop that
        this method cannot work with; what only training needs (rewards, ...) is loaded here.
        """
        ...

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """Group name -> parameters; a group has its own optimiser. Trained tensors are float32."""
        ...

    def group_options(self) -> dict[str, dict[str, float]]:
        """Group -> settings of its optimiser in place of those of [train]: lr, weight_decay, adam_beta1,
        max_grad_norm.
        """
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
