"""Activations of a denoiser's blocks, as a second use of the same call.

Of SD3's transformer they are the picture's stream after a joint block, (R, h w, C) row by row, on the grid of
its patches: h w is the latent's size divided by the side of a patch.

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


def blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Name -> block in the order of the computation: bottom0, ..., mid, up0, ..., of SD3 block0, ...

    Source: DPT, models/unet.py; bottomK is down block K after its downsampler, upK up block K after its
    upsampler.
    """
    parts: Any = denoiser
    if is_joint(denoiser):
        return {f"block{k}": block for k, block in enumerate(parts.transformer_blocks)}
    found = {f"bottom{k}": block for k, block in enumerate(parts.down_blocks)}
    found["mid"] = parts.mid_block
    return found | {f"up{k}": block for k, block in enumerate(parts.up_blocks)}


def is_joint(denoiser: nn.Module) -> bool:
    """Whether it is SD3's transformer, and no UNet."""
    return hasattr(denoiser, "transformer_blocks")


def check_blocks(denoiser: nn.Module, names: Sequence[str], setting: str, model: str) -> None:
    """UserError, about `setting`, for a block that the denoiser of `model` does not have."""
    there = blocks(denoiser)
    kind = "transformer" if is_joint(denoiser) else "UNet"
    for name in names:
        if name not in there:
            raise UserError(
                f"{setting}: the {kind} of {model} has no block {name} (it has {', '.join(there)})"
            )


def own_feature(denoiser: nn.Module) -> str:
    """The block that a denoiser is seen at where none is named. Of a UNet that which gives half the latent's
    side: up1 of four levels (the official choice), up0 of fewer (SDXL has three). Of SD3 the block after two
    thirds of all, which is where up1 lies among the blocks of a UNet (the 7th of 9): what is there has seen
    the text, and is not yet the velocity of single patches. Ours, not measured on a published SD3.
    """
    there = blocks(denoiser)
    if is_joint(denoiser):
        return f"block{max(round(len(there) * 2 / 3), 1) - 1}"
    return "up1" if sum(name.startswith("up") for name in there) >= 4 else "up0"


def block_channels(denoiser: nn.Module) -> dict[str, int]:
    """Name -> channels of what each block gives."""
    parts: Any = denoiser
    if is_joint(denoiser):
        width = parts.config.num_attention_heads * parts.config.attention_head_dim
        return dict.fromkeys(blocks(denoiser), int(width))
    widths = list(parts.config.block_out_channels)
    found = {f"bottom{k}": width for k, width in enumerate(widths)}
    found["mid"] = widths[-1]
    return found | {f"up{k}": width for k, width in enumerate(reversed(widths))}


def observe(
    denoiser: nn.Module,
    names: Sequence[str],
    call: Callable[[], Tensor],
    *,
    to_end: slice | None = None,
    detach_after: str = "",
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Activations of the named blocks in one call of the denoiser, with gradient, whose hooks stay at work.

    Args:
        call: calls the denoiser on R rows. to_end: the rows for which a prediction is wanted: beyond the last
            named block only they are computed (but for SD3 where gradients are checkpointed, whose blocks are
            computed again without these hooks); None stops there.
        detach_after: of the rows `to_end`, what this block gives goes on detached (of a UNet not along the
            skip connections; of SD3 not where gradients are checkpointed).
    Returns:
        name -> (R, C, h, w); and what `call` returns for the rows `to_end`, None without.
    """
    there, joint = blocks(denoiser), is_joint(denoiser)
    order = list(there)
    last = max(map(order.index, names))
    later = [there[name] for name in order[last + 1 :]]
    parts: Any = denoiser
    if joint and later:
        again = torch.is_grad_enabled() and parts.gradient_checkpointing
        later = [] if again else [*later, parts.norm_out]
    seen: dict[str, Tensor] = {}
    size: list[int] = []
    grid: list[tuple[int, int]] = []

    def measure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = args[0] if args else kwargs["hidden_states"]
        size.append(len(z))
        if joint:
            grid.append((z.shape[-2] // parts.config.patch_size, z.shape[-1] // parts.config.patch_size))

    def record(name: str, output: Any) -> None:
        if joint:
            seen[name] = output[1].mT.unflatten(2, grid[-1])
        else:
            seen[name] = output if isinstance(output, Tensor) else output[0]
        if to_end is None and order.index(name) == last:
            raise _EnoughError

    with _hooked() as hooks:
        for name in dict.fromkeys(names):
            hooks.append(
                there[name].register_forward_hook(lambda _m, _i, output, name=name: record(name, output))
            )
        hooks.append(
            denoiser.register_forward_pre_hook(
                lambda _m, args, kwargs: measure(args, kwargs), with_kwargs=True
            )
        )
        if to_end is not None:
            for module in later:
                hooks.append(
                    module.register_forward_pre_hook(
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
    return seen, prediction if later else prediction[to_end]


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

    def cut(x: Tensor) -> Tensor:
        chosen = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
        chosen[rows] = True
        return torch.where(chosen, x.detach(), x)

    if isinstance(output, Tensor):
        return cut(output)
    if isinstance(output[1], Tensor):  # text, if it goes on, and picture of a joint block
        return None if output[0] is None else cut(output[0]), cut(output[1])
    return (cut(output[0]), *output[1:])
