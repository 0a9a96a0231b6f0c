"""Attention as something to look at: heat on greyed pictures. No torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from align_cli.grounding.entities import Entity
from align_cli.pictures import Note

LIGHT, DARK = 150.0, 70.0
"""Levels of what was white and black in a greyed picture."""
STRONGEST = 0.9
"""How much of a pixel is heat where a map has its maximum."""
STOPS = np.array([(45, 10, 85), (140, 30, 100), (222, 73, 60), (250, 160, 20), (252, 250, 160)], float)
"""Colours of heat from none to the maximum: dark violet, red, orange, pale yellow."""


def heat(picture: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """The greyed picture under a map.

    Args:
        picture: (H, W, 3) uint8. relative: (S, S) in [0, 1].
    Returns:
        (H, W, 3) uint8.
    """
    height, width = picture.shape[:2]
    large = Image.fromarray(relative.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    m = np.clip(np.asarray(large), 0, 1)
    luminance = picture.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
    grey = np.repeat((DARK + (LIGHT - DARK) * luminance)[..., None], 3, -1)
    at = np.linspace(0, 1, len(STOPS))
    colour = np.stack([np.interp(m, at, STOPS[:, c]) for c in range(3)], -1)
    share = (STRONGEST * m)[..., None]
    return np.rint((1 - share) * grey + share * colour).astype(np.uint8)


def words_of(entity: Entity) -> str:
    """An entity as its prompt has it: red circle."""
    return " ".join(entity.words)


def note_of(words: str, shares: Mapping[str, float | None]) -> Note:
    """What is said below a map: its words, and how much of it lies on its noun, or how strong it is."""
    inside, area = shares["inside"], shares["area"]
    if inside is not None and area is not None:
        return Note(f"{words}: {100 * inside:.0f} % lies on it ({100 * area:.0f} % of the picture)")
    peak = shares["peak"]
    return Note(f"{words}: at most {peak:.2f}" if peak is not None else words)
