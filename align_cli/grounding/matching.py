"""Which query answers for which box: the cheapest one-to-one assignment per picture.

Letters: B pictures, Q queries, T boxes of the whole batch, K class slots, P pairs of the whole batch,
L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from align_cli.grounding.boxes import giou, to_corners
from align_cli.grounding.targets import Targets


@dataclass(frozen=True)
class Match:
    """Pairs of one picture: int64 (min(Q, T_i),) each, sorted by query; targets count within the picture."""

    queries: Tensor
    targets: Tensor


@torch.no_grad()
def costs(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    class_weight: float = 1,
    box_weight: float = 5,
    giou_weight: float = 2,
) -> list[Tensor]:
    """What it costs to answer for each box of a picture with each query.

        class_weight * (-sum_k softmax(logits)_k classes_k) + box_weight * |box - target|_1 - giou_weight *
        GIoU

    Args:
        logits: (B, Q, K). boxes: (B, Q, 4) centres.
    Returns:
        B times (Q, T_i) float32, also under autocast; NaN where GIoU is.
    Raises:
        ValueError: targets of another number of pictures.
    Source: DPT models/matcher.py. Deviations: none.
    """
    if len(targets.counts) != len(boxes):
        raise ValueError(f"{len(boxes)} pictures of queries, but targets of {len(targets.counts)}")
    boxes = boxes.float()
    flat = boxes.flatten(0, 1)
    with torch.autocast(flat.device.type, enabled=False):
        classes = logits.float().softmax(-1).flatten(0, 1) @ targets.classes.T
    distance = (flat[:, None] - targets.boxes[None]).abs().sum(-1)
    overlap = giou(to_corners(flat), to_corners(targets.boxes))
    all_costs = box_weight * distance - class_weight * classes - giou_weight * overlap
    per_picture = all_costs.view(*boxes.shape[:2], -1).split(targets.counts, -1)
    return [block[i] for i, block in enumerate(per_picture)]


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    class_weight: float = 1,
    box_weight: float = 5,
    giou_weight: float = 2,
) -> list[Match]:
    """The cheapest one-to-one assignment of queries and boxes of each picture; arguments as of `costs`.

    Returns:
        B matches, on the device of the boxes. A picture has as many pairs as it has boxes, or queries if
        these are fewer.
    Raises:
        ValueError: a cost is not a number: a prediction that is none, or without area just where a target
        without area is.
    """
    weights = {"class_weight": class_weight, "box_weight": box_weight, "giou_weight": giou_weight}
    found = []
    for i, cost in enumerate(costs(logits, boxes, targets, **weights)):
        block = cost.cpu().numpy()
        try:
            queries, own = linear_sum_assignment(block)
        except ValueError as error:
            raise ValueError(
                f"picture {i} of the batch cannot be matched: costs that are no numbers (a predicted box is "
                "NaN, or has no area like the target in its place)"
            ) from error
        pairs = (torch.as_tensor(index, device=boxes.device) for index in (queries, own))
        found.append(Match(*pairs))
    return found


def joined(matches: Sequence[Match], counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of the batch: picture, query of it, and box counted through the batch; int64 (P,) each."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    pictures = [torch.full_like(one.queries, i) for i, one in enumerate(matches)]
    targets = [one.targets + start for one, start in zip(matches, starts, strict=True)]
    return torch.cat(pictures), torch.cat([one.queries for one in matches]), torch.cat(targets)


def matched_tokens(matches: Sequence[Match], targets: Targets, queries: int) -> Tensor:
    """(B, queries, L) bool: the tokens of the phrase that each query answers for; none without a box."""
    picture, query, target = joined(matches, targets.counts)
    found = targets.tokens.new_zeros(len(targets.counts), queries, targets.tokens.shape[1])
    found[picture, query] = targets.tokens[target]
    return found
