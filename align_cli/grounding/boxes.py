"""Boxes in pictures. Centres: (cx, cy, w, h); corners: (x0, y0, x1, y1); in any unit of length.

There is no epsilon anywhere: two boxes without area have NaN for their overlap (0 / 0), and so a target
without area meets its own copy with NaN. Source: DPT util/box_ops.py. Deviations: none, but that turned
corners (x1 < x0) are not looked for.

Letters: N M boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """Centres (..., 4) -> corners (..., 4)."""
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """Corners (..., 4) -> centres (..., 4)."""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def area(corners: Tensor) -> Tensor:
    """(..., 4) -> (...), in units squared."""
    return (corners[..., 2] - corners[..., 0]) * (corners[..., 3] - corners[..., 1])


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union, of every box of a with every box of b.

    Args:
        a: (N, 4) corners. b: (M, 4) corners.
    Returns:
        (N, M) in [0, 1], NaN where the union is 0; (N, M) area.
    """
    return _iou(a[:, None], b[None])


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every box of a with every box of b; see `paired_giou`.

    Args:
        a: (N, 4) corners. b: (M, 4) corners.
    Returns:
        (N, M) in (-1, 1].
    """
    return paired_giou(a[:, None], b[None])


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """IoU - (hull - union) / hull, hull the smallest box around both: 1 for equal boxes, near -1 far apart.

    Args:
        a, b: (..., 4) corners, each box of a with its box of b.
    Returns:
        (...) in (-1, 1], NaN where union or hull is 0.
    """
    overlap, union = _iou(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return overlap - (hull - union) / hull


def _iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = area(a) + area(b) - both
    return both / union, union
