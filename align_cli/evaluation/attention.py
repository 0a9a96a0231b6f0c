"""Where a picture looks at the words of its prompt: attention of the denoiser, seen while it draws.

Letters: B pictures, E entities of a prompt, L tokens, H heads, N = r r positions of a layer, S side of a map,
h w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_cli import sampling
from align_cli.errors import UserError
from align_cli.grounding.entities import Entity, EntityReader
from align_cli.grounding.masks import Masker
from align_cli.grounding.parsing import load_parser
from align_cli.models.attention import AttentionMaps, layer_names, watched
from align_cli.models.base import BaseModel, TextCond
from align_cli.settings import SampleSettings

LAYERS = "layers of the middle and the way up (SD3: all blocks, the rows of CLIP alone)"
"""Whose maps are averaged, in words. Source: CoMat, which looks at these of a UNet."""


@dataclass(frozen=True)
class Attention:
    """What is seen of one picture. entities: E of them. maps: (E, S, S) float32 in [0, 1], the share of a
    position's attention that goes to a token of the entity: mean over its tokens, heads, layers and steps.
    """

    entities: tuple[Entity, ...]
    maps: np.ndarray

    def shares(self, masks: np.ndarray | None = None) -> list[dict[str, float | None]]:
        """The numbers of every entity.

        Args:
            masks: (E, h, w) bool, where the picture shows its noun; None if nothing is known of that.
        Returns:
            peak, mean: of its map. inside: share of its map that lies in its mask; area: share of the picture
            that the mask takes, which is what `inside` would be if every position looked alike. Both are None
            where the noun was not found, or is not told apart from another entity's.
        """
        maps = self.maps.astype(np.float64)
        found: list[dict[str, float | None]] = [
            {"peak": float(one.max()), "mean": float(one.mean()), "inside": None, "area": None}
            for one in maps
        ]
        if masks is not None:
            cells = _cells(masks, maps.shape[-1])
            for i, one in enumerate(maps):
                alone = not any((masks[i] == masks[k]).all() for k in range(len(masks)) if k != i)
                if alone and masks[i].any() and one.any():
                    inside = float((one * cells[i]).sum() / one.sum())
                    found[i] |= {"inside": inside, "area": float(masks[i].mean())}
        return found


def _cells(masks: np.ndarray, side: int) -> np.ndarray:
    """(E, h, w) bool -> (E, S, S) float64, the share of each cell that the mask takes."""
    return F.interpolate(torch.from_numpy(masks)[:, None].double(), (side, side), mode="area")[:, 0].numpy()


def reader_of(model: BaseModel, parser: str, *, world: bool) -> EntityReader:
    """What reads the prompts of `model`. parser: see `load_parser`; world: prompts are of the shapes world.

    Raises:
        UserError: see `check` and `load_parser`.
    """
    check(model)
    tokenizer, limit = model.words()
    return EntityReader(load_parser(parser, embedded=world), tokenizer, limit=limit)


def check(model: BaseModel) -> None:
    """UserError if `model`, as it is now, has no attention that could be shown."""
    if model.reader is not None:
        raise UserError(
            "--attention knows the tokens of prompts that are read plainly, and here they are read by "
            "segments (--text segments, or an adapter of longalign); leave --attention away, or give --text "
            "plain and no such adapter"
        )
    _side(model.denoiser, 2**6)


def sample(
    model: BaseModel,
    prompts: Sequence[str],
    entities: Sequence[Sequence[Entity]],
    settings: SampleSettings,
    seeds: Sequence[int],
    callback: sampling.Callback | None = None,
) -> tuple[Tensor, list[Attention]]:
    """`sampling.sample`, and what there is to see of every picture; the pictures differ by rounding alone.

    Args:
        entities: of each prompt.
    Raises:
        UserError: as `sampling.sample` does.
    """
    side = (settings.image_size or model.image_size) // model.vae_factor
    watch = _Watch(model, entities, _side(model.denoiser, side))
    with watched(model.denoiser):
        pictures = sampling.sample(model, prompts, settings, seeds, callback, watch=watch.predictor)
    pairs = zip(entities, watch.maps(), strict=True)
    return pictures, [Attention(tuple(own), maps) for own, maps in pairs]


def masks_of(masker: Masker, picture: np.ndarray, entities: Sequence[Entity]) -> np.ndarray | None:
    """(E, h, w) bool in a picture (h, w, 3) uint8; None where the masker has nothing to say of it."""
    shown = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    found = masker.masks(shown, [[entity.noun for entity in entities]])[0]
    return None if found is None else found.cpu().numpy()


def _side(unet: nn.Module, latent: int) -> int:
    """Of the largest map among LAYERS, for a latent of this side. UserError for a UNet without any."""
    sides = [
        int(name.partition("_")[2])
        for name in layer_names(unet, latent)
        if AttentionMaps().wants(name.partition("_")[0], 0)
    ]
    if not sides:
        raise UserError("--attention: this UNet has no cross-attention in its middle and on its way up")
    return max(sides)


class _WordMaps(AttentionMaps):
    """Maps of one call, reduced as soon as they are there. weights: (B, L, E), of every token in the mean of
    an entity.
    """

    def __init__(self, weights: Tensor, side: int) -> None:
        super().__init__()
        self.weights, self.side, self.num_maps = weights, side, 0
        self.total = weights.new_zeros(len(weights), weights.shape[2], side, side)

    def add(self, place: str, probabilities: Tensor) -> None:
        """Take (B, H, N, L)."""
        weights, more = self.weights, probabilities.shape[-1] - self.weights.shape[1]
        if more:  # soft tokens of SoftREPA stand behind the first; SD3 leaves them out
            extra = weights.new_zeros(len(weights), more, weights.shape[2])
            weights = torch.cat([weights[:, :1], extra, weights[:, 1:]], 1)
        found = (probabilities.float().mean(1) @ weights).movedim(1, 2)
        side = round(found.shape[2] ** 0.5)
        self.total += F.interpolate(
            found.unflatten(2, (side, side)), (self.side, self.side), mode="bilinear", align_corners=False
        )
        self.num_maps += 1


@dataclass
class _Batch:
    """Pictures of one batch. total: (B, E, S, S), the sum of `num_maps` maps."""

    total: Tensor
    num_maps: int = 0


@dataclass
class _Watch:
    """Predicts as `model` does, and keeps what it sees of the conditional half."""

    model: BaseModel
    entities: Sequence[Sequence[Entity]]
    side: int
    batches: list[_Batch] = field(default_factory=list)

    def predictor(self, start: int, size: int) -> sampling.Predict:
        """For the pictures from `start` on, `size` of them."""
        own = self.entities[start : start + size]
        most = max(map(len, own), default=0)
        batch = _Batch(torch.zeros(size, most, self.side, self.side, device=self.model.device))
        self.batches.append(batch)
        if not most:
            return self.model.predict
        weights: Tensor | None = None

        def predict(z: Tensor, t: Tensor, text: TextCond) -> Tensor:
            nonlocal weights
            if weights is None:
                length = min(text.tokens.shape[1], self.model.words()[1])
                weights = _weights(own, length).to(self.model.device)
            half = len(z) - size
            keep = _WordMaps(weights, self.side)
            told = self.model.predict(z[half:], t, text[half:], keep)
            batch.total += keep.total
            batch.num_maps += keep.num_maps
            return torch.cat([self.model.predict(z[:half], t, text[:half]), told]) if half else told

        return predict

    def maps(self) -> list[np.ndarray]:
        """(E, S, S) of every picture."""
        rows = [row / max(1, batch.num_maps) for batch in self.batches for row in batch.total.cpu()]
        return [row[: len(own)].numpy() for row, own in zip(rows, self.entities, strict=True)]


def _weights(entities: Sequence[Sequence[Entity]], length: int) -> Tensor:
    """(B, L, E): 1 / tokens of the entity at each of them; columns beyond a prompt's entities are 0."""
    found = torch.zeros(len(entities), length, max(map(len, entities), default=0))
    for i, own in enumerate(entities):
        for k, entity in enumerate(own):
            found[i, list(entity.positions), k] = 1 / len(entity.positions)
    return found
