"""How far an arm's pictures have moved from the baseline's, whatever the prompts ask: a scorer among others.

Letters: B pictures, D width of the features.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from align_cli.evaluation.scoring import Shown, alike, as_tensor, weights_sha256
from align_cli.evaluation.store import Item, read_picture


@runtime_checkable
class HasFeatures(Hashable, Protocol):
    """A scorer with an image tower."""

    name: str
    device: torch.device

    def facts(self) -> dict[str, str]: ...

    def image_vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        ...


class Drift:
    """saturation, clipped, feature_distance and diversity of every picture.

    saturation: mean over pixels of the largest minus the smallest of R, G and B, in [0, 1]. clipped: share of
    the channel values that are 0 or 255. feature_distance: 1 - cosine between the features of this picture
    and of the baseline's of the same prompt and noise. diversity: mean of 1 - cosine between this picture
    and the others of its prompt; NaN if there are none. The latter two are NaN without features, and where a
    picture is missing.

    Args:
        tower: whose image features are compared, None for nobody's.
        pictures: arm -> the file of every item; baseline: an arm. per_prompt: pictures of every prompt, one
            behind the other.
    """

    name, headline, fraction = "drift", "", False

    def __init__(
        self,
        tower: HasFeatures | None,
        pictures: Mapping[str, Sequence[Path | None]],
        baseline: str,
        per_prompt: int,
    ) -> None:
        self.tower, self.pictures, self.baseline, self.per_prompt = tower, pictures, baseline, per_prompt

    def facts(self) -> dict[str, str]:
        facts = self.tower.facts() | {"weights": weights_sha256(self.tower)} if self.tower else {}
        tower = {f"tower {key}": value for key, value in facts.items()}
        return {"name": self.name, "baseline": self.baseline, "per prompt": str(self.per_prompt), **tower}

    def looks_at(self, arm: str, item: int) -> Sequence[Path]:
        base = self.pictures[self.baseline][item] if arm != self.baseline else None
        files = [base, *(self.pictures[arm][i] for i in self._others(item))]
        return [path for path in files if path is not None]

    def values(self, arm: str, pictures: Sequence[Shown], items: Sequence[Item]) -> dict[str, np.ndarray]:
        found = colours([p.pixels for p in pictures]) | {
            "feature_distance": np.full(len(pictures), np.nan),
            "diversity": np.full(len(pictures), np.nan),
        }
        if self.tower is not None:
            self._compare(arm, pictures, found)
        return found

    def _compare(self, arm: str, pictures: Sequence[Shown], found: Mapping[str, np.ndarray]) -> None:
        known = {p.path: p.pixels for p in pictures}
        for shown in pictures:
            for path in self.looks_at(arm, shown.item):
                if path not in known:
                    known[path] = read_picture(path)
        features = self._features(known)
        for row, shown in enumerate(pictures):
            own, base = features[shown.path], self.pictures[self.baseline][shown.item]
            if arm != self.baseline and base is not None:
                found["feature_distance"][row] = 1 - float(own @ features[base])
            others = [p for i in self._others(shown.item) if (p := self.pictures[arm][i]) is not None]
            if others:
                found["diversity"][row] = 1 - float(np.mean([own @ features[p] for p in others]))

    def _features(self, pictures: Mapping[Path, np.ndarray]) -> dict[Path, np.ndarray]:
        """(D,) float64 of length 1 for every picture."""
        assert self.tower is not None
        paths, found = list(pictures), dict[Path, np.ndarray]()
        for places in alike([pictures[p] for p in paths]):
            rows = features(self.tower, [pictures[paths[i]] for i in places])
            found.update(zip([paths[i] for i in places], rows, strict=True))
        return found

    def _others(self, item: int) -> list[int]:
        """The other items of the same prompt."""
        first = item - item % self.per_prompt
        return [i for i in range(first, first + self.per_prompt) if i != item]


def colours(pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """saturation and clipped of B pictures (H, W, 3) uint8: (B,) each, see `Drift`."""
    wide = [pixels.astype(float) for pixels in pictures]
    return {
        "saturation": np.array([float((x.max(2) - x.min(2)).mean()) / 255 for x in wide]),
        "clipped": np.array([float(((x == 0) | (x == 255)).mean()) for x in wide]),
    }


@torch.no_grad()
def features(tower: HasFeatures, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(B, D) float64, rows of length 1, of B pictures (H, W, 3) uint8 of one size."""
    rows = tower.image_vectors(as_tensor(pictures).to(tower.device)).double().cpu().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def summary(
    values: Mapping[str, Mapping[str, np.ndarray]], arm: str, baseline: str, tower: HasFeatures | None
) -> dict[str, object]:
    """One entry of "drift" in results.json: means over the pictures that both arms have, None where there is
    no number.
    """
    both = ~(np.isnan(values["saturation"][arm]) | np.isnan(values["saturation"][baseline]))

    def mean(key: str, of: str) -> float | None:
        x = values[key][of][both]
        return None if np.isnan(x).all() else float(np.nanmean(x))

    return {
        "arm": arm,
        "feature_distance": mean("feature_distance", arm),
        "feature_of": tower.name if tower is not None else None,
        "saturation": mean("saturation", arm),
        "saturation_base": mean("saturation", baseline),
        "clipped": mean("clipped", arm),
        "clipped_base": mean("clipped", baseline),
        "diversity": mean("diversity", arm),
        "diversity_base": mean("diversity", baseline),
        "of": int(both.sum()),
    }
