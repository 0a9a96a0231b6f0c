"""Probing as a benchmark: how well does a model, seen through a discriminator, tell pictures and texts apart,
and find what a phrase names?

Letters: N items, G items of a gallery, K boxes that are looked at, T true boxes of an item, B rows of a call,
D width of the text's summary, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from align_cli.data.base import Dataset
from align_cli.data.grounded import Grounded
from align_cli.errors import UserError
from align_cli.evaluation.compare import Metric
from align_cli.grounding.boxes import giou, iou, to_corners
from align_cli.losses import matching_logits
from align_cli.models.base import BaseModel, TextCond
from align_cli.pictures import to_uint8
from align_cli.sampling import picture_seeds

ROWS = (("own", "caption"), ("own", "hard"), ("own", "random"), ("hard", "caption"), ("random", "caption"))
"""(picture, text) of the pairs that are scored for every item."""
NO_BOX = torch.zeros(0, 4)
SCORES = tuple(f"score/{picture}-picture-{text}-text" for picture, text in ROWS)
TOP = 10
"""Boxes of an item that are looked at, those of the highest scores."""
OVERLAP = 0.5
"""IoU, or GIoU, from which a box is found."""
MATCHING, RETRIEVAL, GROUNDING = "matching", "retrieval", "grounding"
PROBING = "probing"
"""What counts items, in progress."""
METRICS = {
    MATCHING: ("text", "image", "random-text", "random-image", "overall"),
    RETRIEVAL: ("text-to-image", "image-to-text", "overall"),
    GROUNDING: ("giou-at-1", "giou-at-5", "giou-at-10", "iou"),
}
"""Kind -> its measures; the last one is its headline."""

Progress = Callable[[str, int], None]
"""Called as (what, how many more are done)."""


class Discriminating(Protocol):
    """What is asked of a method; DPT's discriminator can do it."""

    def matching(self, z_t: Tensor, t: Tensor, told: list[str] | TextCond) -> Tensor:
        """(B, Q, D) of noisy latents (B, C, h, w) at t (B,), each under its prompt, or under what the model
        has made of it; D is the width of the model's summaries.
        """

    def ground(self, z_t: Tensor, t: Tensor, expressions: list[str]) -> tuple[Tensor, Tensor]:
        """Boxes (B, Q, 4), centres and sizes, and their scores (B, Q)."""


@dataclass(frozen=True)
class Item:
    """What is asked about. index: in the dataset. picture: digest of the pixels, by which equal ones are
    known. boxes: (T, 4), what the expression names.
    """

    index: int
    caption: str
    expression: str
    picture: str
    boxes: Tensor


@dataclass(frozen=True)
class Probed:
    """What one discriminator says.

    scores: (N, 5), of the pairs ROWS; NaN where an item is not for matching. galleries: (G, G) each, the
    score of every picture under every caption (rows are pictures) of one block of items after another.
    boxes: N times (K, 4), the best first; (0, 4) where an item is not for grounding. pictures: of the first
    items, (H, W, 3) uint8.
    """

    items: list[Item]
    scores: np.ndarray
    galleries: list[np.ndarray]
    boxes: list[Tensor]
    pictures: list[np.ndarray]


@dataclass(frozen=True)
class Setting:
    """How is asked. timestep: of the noise. gallery: G; 0 for no retrieval. batch_size: rows of a call of the
    UNet. shown: pictures that are kept.
    """

    seed: int
    timestep: int
    gallery: int
    batch_size: int
    shown: int = 0


def chosen(dataset: Dataset, n: int, seed: int) -> list[int]:
    """`n` examples of the dataset, all of it if it has no more, in an order drawn from the seed."""
    rng = np.random.default_rng([seed, 70])
    return [int(i) for i in rng.permutation(len(dataset))[:n]]


def gallery_rows(n: int, gallery: int) -> int:
    """Rows of the UNet that retrieval among `n` items takes; what is left of the last gallery is left out."""
    size = min(n, gallery)
    return n // size * size**2 if size else 0


@torch.no_grad()
def probe(
    method: Discriminating,
    model: BaseModel,
    dataset: Dataset,
    indices: Sequence[int],
    setting: Setting,
    progress: Progress,
) -> Probed:
    """Ask a discriminator about items.

    Every item has one noise, from the seed and its place, for all its pictures; latents are the means of
    their posteriors (the official code draws from them). So all who are asked see the same, as far as their
    latents have one shape.

    Args:
        method: at work on `model`. progress: called with "probing" and items, "retrieval" and rows.
    Raises:
        UserError: scores that are no finite numbers.
    """
    eye = _Eye(method, model, setting, picture_seeds(setting.seed, len(indices)))
    found = Probed([], np.full((len(indices), len(ROWS)), np.nan), [], [], [])
    own: list[Tensor] = []
    size = max(1, setting.batch_size // len(ROWS))
    for start in range(0, len(indices), size):
        some = indices[start : start + size]
        examples = [dataset.get(i, np.random.default_rng([setting.seed, 71, i])) for i in some]
        told = [cast("Grounded", example.extra["grounded"]) for example in examples]
        pixels = [cast("Tensor", example.pixels) for example in examples]
        captions = [example.prompt for example in examples]
        z = eye.noisy(pixels, range(start, start + len(some)))
        matched = [k for k, g in enumerate(told) if g.for_matching]
        if matched:
            found.scores[[start + k for k in matched]] = _matched(eye, z, captions, told, matched, start)
        named = [k for k, g in enumerate(told) if g.for_grounding]
        boxes = eye.boxes(z[named], [told[k].expression for k in named]) if named else []
        by_place = dict(zip(named, boxes, strict=True))
        found.boxes.extend(by_place.get(k, NO_BOX) for k in range(len(some)))
        own.extend(z)
        for i, caption, g, x in zip(some, captions, told, pixels, strict=True):
            digest = sha256(x.numpy().tobytes()).hexdigest()[:16]
            found.items.append(Item(i, caption, g.expression, digest, g.boxes))
            if len(found.pictures) < setting.shown:
                found.pictures.append(to_uint8((x[None] + 1) / 2)[0])
        progress(PROBING, len(some))
    found.galleries.extend(_galleries(eye, own, [item.caption for item in found.items], setting, progress))
    return found


def _matched(
    eye: _Eye, own: Tensor, captions: list[str], told: list[Grounded], places: list[int], start: int
) -> np.ndarray:
    """(M, 5): scores of the pairs ROWS of the items at `places` of a batch that starts with item `start`.

    own: (B, C, h, w) of the whole batch.
    """
    some = [told[k] for k in places]
    numbers = [start + k for k in places]
    sees = {
        "own": own[places],
        "hard": eye.noisy([g.hard_pixels for g in some], numbers),
        "random": eye.noisy([g.random_pixels for g in some], numbers),
    }
    texts = {
        "caption": [captions[k] for k in places],
        "hard": [g.hard_prompt for g in some],
        "random": [g.random_prompt for g in some],
    }
    z = torch.cat([sees[picture] for picture, _ in ROWS])
    rows = eye.model.summarised([text for _, name in ROWS for text in texts[name]])
    scores = eye.scores(z, *rows)
    return scores.view(len(ROWS), -1).T.numpy()


@dataclass(frozen=True)
class _Eye:
    """The discriminator at one noise level. seeds: of the items' noise."""

    method: Discriminating
    model: BaseModel
    setting: Setting
    seeds: list[int]

    def noisy(self, pixels: list[Tensor], numbers: Sequence[int]) -> Tensor:
        """(B, C, h, w) of pictures (3, H, W), with the noise of the items of these numbers."""
        latents = self.model.encode_image(torch.stack(pixels))
        seeds = [self.seeds[i] for i in numbers]
        noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        eps = torch.stack(noise).to(latents.device, latents.dtype)
        return self.model.process.add_noise(latents, eps, self._t(len(pixels)))

    def scores(self, z_t: Tensor, cond: TextCond, vectors: Tensor) -> Tensor:
        """(B,) float32 on the CPU: the best query's cosine with the text.

        Args:
            cond, vectors: B rows of `summarised` prompts.
        Raises:
            UserError: they are no finite numbers.
        """
        seen = self.method.matching(z_t, self._t(len(z_t)), cond).float()
        found = matching_logits(seen[:, None], vectors[:, None].float())[:, 0].cpu()
        if not torch.isfinite(found).all():
            raise UserError(
                f"the discriminator gives scores on {self.model.model_id} that are no finite numbers; try "
                "--dtype float32"
            )
        return found

    def boxes(self, z_t: Tensor, expressions: list[str]) -> list[Tensor]:
        """(K, 4) float32 on the CPU of each, the best first."""
        boxes, scores = self.method.ground(z_t, self._t(len(z_t)), expressions)
        best = scores.topk(min(TOP, scores.shape[1]), dim=1).indices
        return list(boxes.gather(1, best[..., None].expand(-1, -1, 4)).float().cpu())

    def _t(self, rows: int) -> Tensor:
        return torch.full((rows,), self.setting.timestep, device=self.model.device)


def _galleries(
    eye: _Eye, own: list[Tensor], captions: list[str], setting: Setting, progress: Progress
) -> list[np.ndarray]:
    """Every picture under every caption, block by block; what is left after the last one is left out."""
    size = min(len(own), setting.gallery)
    found = []
    for start in range(0, len(own) - size + 1, size) if size else ():
        block, z = captions[start : start + size], torch.stack(own[start : start + size])
        cond, vectors = eye.model.summarised(block)
        scores = torch.empty(size * size)
        for first in range(0, size * size, setting.batch_size):
            pairs = range(first, min(first + setting.batch_size, size * size))
            pictures, texts = [k // size for k in pairs], [k % size for k in pairs]
            scores[first : pairs.stop] = eye.scores(z[pictures], cond[texts], vectors[texts])
            progress(RETRIEVAL, len(pairs))
        found.append(scores.view(size, size).numpy())
    return found


# ---------------------------------------------------------------- measures


def metrics(*, retrieval: bool) -> list[Metric]:
    """All that is measured."""
    return [
        Metric(f"{kind}/{name}", kind, name == names[-1], fraction=True)
        for kind, names in METRICS.items()
        if retrieval or kind != RETRIEVAL
        for name in names
    ]


def measure(probed: Probed) -> dict[str, np.ndarray]:
    """Metric -> (N,) in [0, 1], NaN where it is not asked.

    matching: whether the true text, or picture, has a higher score than the false one; a tie counts half.
    overall is the mean of text and image. retrieval: whether the highest score of a gallery is a right one
    (the same caption twice, or the same picture, is right twice), shared among equals. grounding: whether one
    of the first boxes has the wanted overlap with a true box; NaN for an expression without a box.

    Source: evaluation.py and refcoco_eval.py of github.com/LgQu/DPT-T2I, which count ties as won, draw
    another noise for every text, and whose precision at 1, 5 and 10 is that of GIoU.
    """
    own, hard_text, random_text, hard_image, random_image = probed.scores.T
    found = {
        "matching/text": _won(own, hard_text),
        "matching/image": _won(own, hard_image),
        "matching/random-text": _won(own, random_text),
        "matching/random-image": _won(own, random_image),
    }
    found["matching/overall"] = (found["matching/text"] + found["matching/image"]) / 2
    if probed.galleries:
        right = _right(probed)
        of_text = [_first(s.T, r.T) for s, r in zip(probed.galleries, right, strict=True)]
        of_image = [_first(s, r) for s, r in zip(probed.galleries, right, strict=True)]
        for name, parts in (("text-to-image", of_text), ("image-to-text", of_image)):
            values = np.full(len(probed.items), np.nan)
            values[: sum(map(len, parts))] = np.concatenate(parts)
            found[f"retrieval/{name}"] = values
        found["retrieval/overall"] = (found["retrieval/text-to-image"] + found["retrieval/image-to-text"]) / 2
    pairs = list(zip(probed.boxes, (item.boxes for item in probed.items), strict=True))
    for k in (1, 5, 10):
        found[f"grounding/giou-at-{k}"] = np.array([_found(giou_of, b[:k], true) for b, true in pairs])
    found["grounding/iou"] = np.array([_found(iou_of, b[:1], true) for b, true in pairs])
    return found


def chance(probed: Probed) -> dict[str, float]:
    """Metric -> what guessing gives: a coin; a candidate of the gallery; as boxes, those of as many other
    items, drawn at random. NaN where there are no others.
    """
    found = {f"{MATCHING}/{name}": 0.5 for name in METRICS[MATCHING]}
    if probed.galleries:
        share = float(np.mean([right.mean() for right in _right(probed)]))
        found |= {f"{RETRIEVAL}/{name}": share for name in METRICS[RETRIEVAL]}
    named = [item.boxes for item in probed.items]
    for k in (1, 5, 10):
        found[f"grounding/giou-at-{k}"] = _guessed(giou_of, named, k)
    found["grounding/iou"] = _guessed(iou_of, named, 1)
    return found


def ties(probed: Probed) -> int:
    """Pairs of a true and a hard false candidate with one score."""
    return int((probed.scores[:, [1, 3]] == probed.scores[:, :1]).sum())


def _won(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    return (np.sign(true - false) + 1) / 2


def _right(probed: Probed) -> list[np.ndarray]:
    """(G, G) bool of each gallery: the pairs that belong together."""
    found, start = [], 0
    for scores in probed.galleries:
        block = probed.items[start : start + len(scores)]
        start += len(block)
        captions, pictures = (np.array([getattr(x, key) for x in block]) for key in ("caption", "picture"))
        found.append((captions[:, None] == captions) | (pictures[:, None] == pictures))
    return found


def _first(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(G,): the share of right ones among the highest of each row."""
    top = scores == scores.max(axis=1, keepdims=True)
    found: np.ndarray = (top & right).sum(axis=1) / top.sum(axis=1)
    return found


Overlap = Callable[[Tensor, Tensor], Tensor]


def iou_of(boxes: Tensor, others: Tensor) -> Tensor:
    """(K, T) of centres and sizes (K, 4) and (T, 4)."""
    return iou(to_corners(boxes), to_corners(others))[0]


def giou_of(boxes: Tensor, others: Tensor) -> Tensor:
    """(K, T) of centres and sizes (K, 4) and (T, 4)."""
    return giou(to_corners(boxes), to_corners(others))


def _found(overlap: Overlap, boxes: Tensor, true: Tensor) -> float:
    """1 if one of the boxes is a true one, else 0; NaN where there is no true one."""
    return float((overlap(boxes, true) >= OVERLAP).any()) if len(true) else np.nan


def _guessed(overlap: Overlap, named: list[Tensor], k: int) -> float:
    """Mean probability that one of `k` boxes of other items is a true one."""
    pool = [boxes[:1] for boxes in named if len(boxes)]
    asked = [boxes for boxes in named if len(boxes)]
    if len(asked) < 2:
        return np.nan
    others = torch.cat(pool)
    hits = torch.stack([(overlap(others, true) >= OVERLAP).any(dim=1) for true in asked]).float()
    share = (hits.sum(1) - hits.diagonal()) / (len(asked) - 1)
    return float((1 - (1 - share) ** k).mean())
