"""What the queries of a grounding model are to find: the boxes of a batch, and the tokens that name each.

Letters: B pictures, T boxes of the whole batch, L tokens of an expression, K class slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]
"""Characters [start, end) of an expression."""


@dataclass(frozen=True)
class Targets:
    """The boxes of a batch, all pictures in order.

    boxes: (T, 4) float32 centres and sizes relative to the picture. counts: boxes of each picture, T in all.
    classes: (T, K) float32, 1 in the slots of the tokens that name the box, else 0; the last slot, which
    means no object, is always 0. tokens: (T, L) bool, the same in the batch's tokenisation.
    """

    boxes: Tensor
    counts: list[int]
    classes: Tensor
    tokens: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """The same on `device`."""
        return Targets(self.boxes.to(device), self.counts, self.classes.to(device), self.tokens.to(device))


def token_spans(encoding: Any, row: int, spans: Sequence[Span], length: int) -> Tensor:
    """(length,) bool: the tokens of an expression that its character ranges touch.

    A range that starts or ends on a character without token (a blank) is taken from up to two characters
    later, or to up to two characters earlier; if these have none either, the range is left out.
    Args:
        encoding: BatchEncoding of a fast tokenizer. row: the expression in it.
    Source: DPT data/dataset/refcoco.py, create_positive_map. Deviations: the align loss there looks blanks up
    in the first expression of the batch; here always in the expression's own.
    """
    found = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        first = _token(encoding, row, (start, start + 1, start + 2))
        last = _token(encoding, row, (end - 1, end - 2, end - 3))
        if first is not None and last is not None:
            found[first : last + 1] = True
    return found


def _token(encoding: Any, row: int, characters: Sequence[int]) -> int | None:
    """The token of the first of these characters that has one."""
    found = (encoding.char_to_token(row, at) for at in characters if at >= 0)
    return next((token for token in found if token is not None), None)


def make_targets(
    encoding: Any, boxes: Sequence[Tensor], spans: Sequence[Sequence[Sequence[Span]]], slots: int = 256
) -> Targets:
    """The targets of a batch of expressions.

    Args:
        encoding: BatchEncoding of B expressions, of a fast tokenizer, padded to L tokens. boxes: B times
        (T_i, 4) centres. spans: for each expression and each of its boxes, the ranges that name it.
        slots: K, the last for no object; tokens beyond the others have no slot.
    Raises:
        ValueError: not B of each, or not a list of spans per box.
    Source: DPT; all slots of a phrase count 1, however long it is, as its collate step has it.
    """
    rows, length = encoding["input_ids"].shape
    counts = [len(own) for own in boxes]
    if not rows == len(boxes) == len(spans) or counts != [len(own) for own in spans]:
        raise ValueError(
            f"{rows} expressions, boxes {counts}, lists of spans {[len(own) for own in spans]}: each "
            "expression needs its boxes, and each box its spans"
        )
    found = [token_spans(encoding, i, one, length) for i, own in enumerate(spans) for one in own]
    tokens = torch.stack(found) if found else torch.zeros(0, length, dtype=torch.bool)
    classes = torch.zeros(len(found), slots)
    used = min(length, slots - 1)
    classes[:, :used] = tokens[:, :used].float()
    return Targets(torch.cat([*boxes, torch.zeros(0, 4)]).float(), counts, classes, tokens)
