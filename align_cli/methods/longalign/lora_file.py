"""The official LoRA files of LongAlign: `lora_vis.pt` and its like, read and written.

Such a file is a list of tensors without names, `[up, down, up, down, ...]`: B and A of one layer after
another, in the order of `longalign_layers`. There is no alpha: B A is added as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.methods.longalign.layers import longalign_layers
from align_cli.models.states import LORA_A, LORA_B


def from_list(content: object, unet: nn.Module, where: str) -> dict[str, Tensor]:
    """The state of a LoRA, float32, from what a file holds.

    unet: gives the layers and their shapes; its outline will do. where: the file, for messages.
    Raises:
        UserError: no list of tensors; another number of them; one that does not fit its layer; several ranks;
        values that are no finite numbers.
    """
    if not isinstance(content, list) or not all(isinstance(x, Tensor) for x in content):
        raise UserError(
            f"{where} holds no list of tensors without names (up and down of one layer after another), as "
            f"the official code of LongAlign saves them, but a {type(content).__name__}"
        )
    layers = longalign_layers(unet)
    if len(content) != 2 * len(layers):
        raise UserError(
            f"{where} holds {len(content)} tensors; the LoRA of this UNet has {2 * len(layers)}, two for "
            f"each of {len(layers)} layers: name its base model with --model"
        )
    state: dict[str, Tensor] = {}
    rank = len(content[1])
    for number, name in enumerate(layers):
        layer: Any = unet.get_submodule(name)
        o, i, *kernel = layer.weight.shape
        expected = {LORA_A: [rank, i, *kernel], LORA_B: [o, rank, *[1] * len(kernel)]}
        found = {LORA_A: content[2 * number + 1], LORA_B: content[2 * number]}
        for end, value in found.items():
            if list(value.shape) != expected[end]:
                raise UserError(
                    f"{where} does not fit: layer {number + 1} of {len(layers)}, {name}, has "
                    f"{'down' if end == LORA_A else 'up'} of shape {list(value.shape)}, expected "
                    f"{expected[end]}; name its base model with --model"
                )
            if not torch.is_floating_point(value) or not torch.isfinite(value).all():
                raise UserError(f"{where}: {name} holds values that are no finite numbers")
            state[name + end] = value.detach().float().contiguous()
    return state


def to_list(state: Mapping[str, Tensor], unet: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """What a file holds, from the state of a LoRA (alpha = rank) on all layers. Inverse of `from_list`."""
    return [
        state[name + end].detach().cpu().to(dtype).contiguous()
        for name in longalign_layers(unet)
        for end in (LORA_B, LORA_A)
    ]
