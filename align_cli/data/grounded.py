"""What an example holds for methods that tell pictures and texts apart and find what is named."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grounded:
    """Under `extra["grounded"]` of an `Example`, whose prompt is the caption of the whole picture.

    T boxes of one picture; no box (T = 0) is possible.
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
