"""Activations of a UNet's blocks, as a second use of the same call.

Letters: R rows of the call, C h w activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align_cli.errors import UserError


class _EnoughError(Exception):
    """The last block that was asked for is done."""


def blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> block in the order of the computation: bottom0, ..., mid, up0, ...

    Source: DPT, models/unet.py; bottomK is down block K after its downsampler, upK up block K after its
    upsampler.
    """
    parts: Any = unet
    found = {f"bottom{k}": block for k, block in enumerate(parts.down_blocks)}
    found["mid"] = parts.mid_block
    return found | {f"up{k}": block for k, block in enumerate(parts.up_blocks)}


def check_blocks(unet: nn.Module, names: Sequence[str], setting: str, model: str) -> None:
    """UserError, about `setting`, for a block that the UNet of `model` does not have."""
    there = blocks(unet)
    for name in names:
        if name not in there:
            raise UserError(f"{setting}: the UNet of {model} has no block {name} (it has {', '.join(there)})")


def observe(
    unet: nn.Module,
    names: Sequence[str],
    call: Callable[[], Tensor],
    *,
    to_end: slice | None = None,
    detach_after: str = "",
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Activations of the named blocks in one call of the UNet, with gradient, whose hooks stay at work.

    Args:
        call: calls the UNet on R rows. to_end: the rows for which a prediction is wanted: beyond the last
            named block only they are computed; None stops there.
        detach_after: of the rows `to_end`, what this block gives goes on detached (not along the skip
            connections).
    Returns:
        name -> (R, C, h, w); and what `call` returns for the rows `to_end`, None without.
    """
    there = blocks(unet)
    order = list(there)
    last = max(map(order.index, names))
    seen: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        seen[name] = output if isinstance(output, Tensor) else output[0]
        if to_end is None and order.index(name) == last:
            raise _EnoughError

    with _hooked() as hooks:
        for name in dict.fromkeys(names):
            hooks.append(
                there[name].register_forward_hook(lambda _m, _i, output, name=name: record(name, output))
            )
        if to_end is not None:
            size: list[int] = []
            hooks.append(unet.register_forward_pre_hook(lambda _m, args: size.append(len(args[0]))))
            for name in order[last + 1 :]:
                hooks.append(
                    there[name].register_forward_pre_hook(
                        lambda _m, args, kwargs: (
                            _rows(args, size[-1], to_end),
                            _rows(kwargs, size[-1], to_end),
                        ),
                        with_kwargs=True,
                    )
                )
            if detach_after:
                whole = order.index(detach_after) <= last
                rows = to_end if whole else slice(None)
                hooks.append(
                    there[detach_after].register_forward_hook(lambda _m, _i, output: _detached(output, rows))
                )
        try:
            prediction = call()
        except _EnoughError:
            return seen, None
    assert to_end is not None
    return seen, prediction if order[last + 1 :] else prediction[to_end]


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def alike_at_first(unet: nn.Module, first: Tensor, again: Tensor) -> Iterator[None]:
    """Inside, what a UNet computes before it reads the text is computed once for rows that are alike: of the
    same latent and timestep, under different texts. Not for SDXL, whose time embedding has the text in it.
    Where gradients are checkpointed nothing is shared: the backward pass computes parts again, unhooked.

    Args:
        first: (U,) one row of each kind. again: (R,) the kind of each row.
    """
    recomputed = torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False)
    with _hooked() as hooks:
        for module in [] if recomputed else _before_text(unet):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs: (
                        _rows(args, len(again), first), _rows(kwargs, len(again), first),
                    ),
                    with_kwargs=True,
                )
            )  # fmt: skip
            hooks.append(module.register_forward_hook(lambda _m, _i, output: output[again]))
        yield


def _before_text(unet: nn.Module) -> list[nn.Module]:
    """The modules of a UNet up to its first self-attention; the first cross-attention comes next."""
    parts: Any = unet
    found: list[nn.Module] = [parts.conv_in]
    for block in parts.down_blocks:
        attentions = getattr(block, "attentions", None)
        for k, resnet in enumerate(block.resnets):
            found.append(resnet)
            if attentions:
                inner = attentions[k].transformer_blocks[0]
                return [*found, attentions[k].norm, attentions[k].proj_in, inner.norm1, inner.attn1]
        found += list(block.downsamplers or [])
    return found


def _rows(value: Any, size: int, rows: slice | Tensor) -> Any:
    """The same arguments with those rows only of every tensor that has all of them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == size else value
    if isinstance(value, tuple):
        return tuple(_rows(x, size, rows) for x in value)
    if isinstance(value, dict):
        return {key: _rows(x, size, rows) for key, x in value.items()}
    return value


def _detached(output: Any, rows: slice) -> Any:
    """A block's output whose rows `rows` carry no gradient; a down block's skip connections still do."""
    x = output if isinstance(output, Tensor) else output[0]
    chosen = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    chosen[rows] = True
    x = torch.where(chosen, x.detach(), x)
    return x if isinstance(output, Tensor) else (x, *output[1:])
