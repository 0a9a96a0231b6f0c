"""What an example holds for methods that tell pictures and texts apart and find what is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grounded:
    """Under `extra["grounded"]` of an `Example`, whose prompt is the caption of the whole picture.

    T boxes of one picture. Examples for training, and all of the shapes world, have everything. Of RefCOCO's
    held-out examples some are for matching alone (T = 0, the expression is the caption) and the others for
    grounding alone (false captions are empty, and false pictures zeros).
    """

    expression: str
    """Refers to something in the picture: "a red circle"."""
    boxes: Tensor
    """(T, 4) float32, what it refers to: centre, width and height (cx, cy, w, h) relative to the picture, in
    [0, 1]; width and height are not 0."""
    spans: list[list[tuple[int, int]]]
    """Per box: the character ranges [start, end) of the expression that name it."""
    hard_prompt: str
    """A caption that is almost true."""
    random_prompt: str
    """A caption of another picture."""
    hard_pixels: Tensor
    """(3, H, W) float32 in [-1, 1]: a picture that the caption almost fits."""
    random_pixels: Tensor
    """(3, H, W) float32 in [-1, 1]: any other picture."""
    size: tuple[int, int]
    """(height, width) of the picture as it was stored, in pixels."""

    @property
    def for_grounding(self) -> bool:
        """Whether it says where something is."""
        return len(self.boxes) > 0

    @property
    def for_matching(self) -> bool:
        """Whether it has false captions and pictures."""
        return bool(self.hard_prompt)


def relative(corners: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> Tensor:
    """Boxes (T, 4) as `Grounded` has them, of x0, y0, x1, y1 in pixels; T >= 1. size: (height, width)."""
    height, width = size
    first, last = torch.tensor(corners, dtype=torch.float32).split(2, dim=1)
    return torch.cat([(first + last) / 2, last - first], dim=1) / torch.tensor([width, height] * 2)
