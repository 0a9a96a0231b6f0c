"""States of trained modules: the keys of LoRA, and a check against what is expected. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""Ends of the keys of a LoRA's state, as in peft; before them is the name of the layer."""

_LAYER = re.compile(r"(?:unet\.){0,2}(.+\.to_(?:q|k|v|out\.0))\.lora(?:\.(down|up)|_([AB]))\.weight")
_PROCESSOR = re.compile(r"(?:unet\.){0,2}(.+\.)processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_SIDES = {"down": LORA_A, "A": LORA_A, "up": LORA_B, "B": LORA_B}


def attention_lora_key(key: str) -> str | None:
    """Our key of a LoRA on attention for one of a file of diffusers, in any of its spellings, with "unet."
    before it twice, once or not at all; None for what is none.

        LAYER.to_out.0.lora_A.weight, LAYER.to_out.0.lora.down.weight, LAYER.processor.to_out_lora.down.weight
    """
    if found := _LAYER.fullmatch(key):
        return found[1] + _SIDES[found[2] or found[3]]
    if found := _PROCESSOR.fullmatch(key):
        return f"{found[1]}to_{found[2]}{'.0' if found[2] == 'out' else ''}{_SIDES[found[3]]}"
    return None


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
