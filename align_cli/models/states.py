"""States of trained modules: the keys of LoRA, and a check against what is expected. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""Ends of the keys of a LoRA's state, as in peft; before them is the name of the layer."""


def by_group(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """First word of the key -> its tensors, by the rest of the key."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        group, _, rest = key.partition(".")
        groups.setdefault(group, {})[rest] = value
    return groups


def check_state(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> None:
    """ValueError naming missing, unused and wrongly shaped keys (of each kind, the first three)."""
    missing, unused = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    wrong = [
        f"{k} has shape {list(state[k].shape)}, expected {list(shapes[k])}"
        for k in sorted(shapes.keys() & state.keys())
        if list(state[k].shape) != list(shapes[k])
    ]
    problems = [f"missing {_few(missing)}"] * bool(missing) + [f"unused {_few(unused)}"] * bool(unused)
    if problems + wrong:
        raise ValueError("; ".join(problems + wrong[:3]))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
