"""CoMat: from detections to one mask per noun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from align_cli.grounding.boxes import to_corners
from align_cli.grounding.masks import counted, masks_of_nouns, sent_to_detector
from golden_checks.lines import Kind, Line, same


def best_segment(box: Tensor, segments: Tensor) -> int:
    """The segment of the largest IoU with a filled box: what the official code takes in place of a mask of
    the box itself.

    Args:
        box: (4,) corners in whole pixels. segments: (S, H, W) bool.
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    inside = segments[:, y0:y1, x0:x1].flatten(1).sum(1)
    union = segments.flatten(1).sum(1) + (x1 - x0) * (y1 - y0) - inside
    return int((inside / union).argmax())


def masks_from_boxes(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """What the detector is asked, the boxes that count, and the mask of every noun."""
    tensors = load_file(folder / "tensors.safetensors")
    nouns, segments = case["nouns"], tensors["segments"].bool()
    height, width = segments.shape[1:]
    yield same("caption_sent_to_detector", sent_to_detector(nouns), case["caption_sent_to_detector"] + ".")
    size = torch.tensor([width, height, width, height])
    boxes = to_corners(tensors["boxes_cxcywh"]).mul(size).round().clamp(min=0).minimum(size.float())
    pairs = counted(nouns, case["phrases"])
    chosen = [best_segment(boxes[box], segments) for box, _ in pairs]
    yield same("selected_segment", chosen, case["selected_segment"])
    masks = masks_of_nouns(len(nouns), pairs, segments[chosen])
    for k in range(len(nouns)):
        yield same(f"noun_mask_{k}", masks[k].int().tolist(), tensors[f"noun_mask.{k}"][0, 0].int().tolist())


KINDS = [Kind("comat", lambda _, case: "selected_segment" in case, masks_from_boxes)]
