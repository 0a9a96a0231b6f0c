"""The shapes world as training data and as held-out evaluation prompts."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from align_cli.data.base import Example
from align_cli.settings import DataSettings
from align_cli.shapes.captions import LONG_RATE, Prompt, hard_negative, has_long_caption, recaption
from align_cli.shapes.world import SCENE_KINDS, Scene, render, sample_scenes

WEIGHTS = (0.2, 0.5, 0.15, 0.15)
"""Share of single, pair, count and triple scenes in training."""
MIXTURES = {
    "all": (SCENE_KINDS, WEIGHTS, LONG_RATE),
    "pairs": (("pair", "triple"), (0.75, 0.25), LONG_RATE),
    "long": (("pair", "triple"), (0.5, 0.5), 1.0),
}
"""data.mixture -> kinds of scenes, their shares, and how many of those that can have a long caption get one.
"""
DEFAULT_SIZE = 4096
"""Training scenes where data.num_examples is 0."""
HELD_OUT_KINDS = ("pair", "triple", "long")
"""Prompt kinds whose compositions can be held out."""
HARD_NEGATIVES = 3
"""False captions drawn per example, in `extra["negatives"]`; a method takes as many as it wants."""


class ShapesDataset:
    """Pictures with captions that are drawn afresh, and truly, at every access.

    `get` returns pixels (3, 32, 32) in [-1, 1], a caption, and in `extra`: negatives (list of false
    captions), boxes (list of (phrase, box in pixels)). With the mixture "long" every caption has five
    sentences.
    """

    world = "shapes-2"
    """Name of what is drawn, in the fingerprint: another one wherever that changes."""

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        self.size = settings.num_examples or DEFAULT_SIZE
        self.seed, self.split, self.mixture = seed, split, settings.mixture
        self.pictures = pictures
        self.kinds, self.weights, self.long_rate = MIXTURES[settings.mixture]

    @cached_property
    def scenes(self) -> list[Scene]:
        rng = np.random.default_rng([self.seed, 20])
        found: list[Scene] = []
        while len(found) < self.size:
            drawn = sample_scenes(self.size, rng, kinds=self.kinds, weights=self.weights, split=self.split)
            found += [s for s in drawn if self.long_rate < 1 or has_long_caption(s)]
        return found[: self.size]

    @cached_property
    def rendered(self) -> np.ndarray:
        """(N, 32, 32, 3) uint8."""
        return render(self.scenes)

    def __len__(self) -> int:
        return self.size

    def get(self, index: int, rng: np.random.Generator) -> Example:
        scene = self.scenes[index]
        prompt = recaption(scene, rng, long_rate=self.long_rate)
        pixels = self._pixels(index) if self.pictures else None
        negatives = [hard_negative(prompt, rng, split=self.kept_split).text for _ in range(HARD_NEGATIVES)]
        extra = {"negatives": negatives, "boxes": scene.boxes()}
        return Example(prompt=prompt.text, pixels=pixels, id=index, extra=extra)

    @property
    def kept_split(self) -> str | None:
        """The split that false captions keep to, so that training never meets a held-out composition."""
        return "train" if self.split == "train" else None

    @staticmethod
    def to_pixels(rendered: np.ndarray) -> Tensor:
        """(3, 32, 32) float32 in [-1, 1] of a picture (32, 32, 3) uint8."""
        return torch.from_numpy(rendered).permute(2, 0, 1).float() / 127.5 - 1

    def _pixels(self, index: int) -> Tensor:
        return self.to_pixels(self.rendered[index])

    def fingerprint(self) -> str:
        """Identity of the data: world, size, seed and split."""
        text = json.dumps([self.world, self.size, self.seed, self.split, self.mixture])
        return sha256(text.encode()).hexdigest()[:16]


def eval_prompts(
    n: int, seed: int = 0, *, split: str = "test", kinds: tuple[str, ...] | None = None, novel: bool = True
) -> list[Prompt]:
    """`n` prompts for an evaluation, the same for the same arguments.

    Args:
        split: test, val or train. In test and val every prompt of kind pair, triple or long holds at least
        one pair of objects that was never seen together in training.
        kinds: prompt kinds to draw from (default: the held-out kinds pair, triple, long as 6 : 2 : 2).
        novel: keep only distinct texts while there are enough of them.
    """
    rng = np.random.default_rng([seed, 30])
    kinds = kinds or HELD_OUT_KINDS
    share = {"pair": 0.6, "triple": 0.2, "long": 0.2, "single": 0.2, "count": 0.2}
    total = sum(share[k] for k in kinds)
    left = {k: round(n * share[k] / total) for k in kinds}
    left[kinds[0]] += n - sum(left.values())
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for kind in kinds:
        tries = 0
        while left[kind] > 0:
            scene_kinds = ("pair", "triple") if kind == "long" else (kind,)
            for scene in sample_scenes(max(64, left[kind]), rng, kinds=scene_kinds, split=split):
                prompt = recaption(scene, rng, long_rate=1.0 if kind == "long" else 0.0)
                fresh = prompt.text not in seen or not novel or tries > 20
                if prompt.kind == kind and fresh and left[kind] > 0:
                    seen.add(prompt.text)
                    prompts.append(prompt)
                    left[kind] -= 1
            tries += 1
    return prompts
