"""Soft text tokens and how a UNet gets to see them: forward pre-hooks, so the model itself is never changed.

Letters: B batch, L text tokens, N soft tokens, D text width, R table rows, W table width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align_cli.methods.softrepa.config import NUM_TRAIN_TIMESTEPS, TABLE_ROWS, TABLE_STRIDE


def table_row(t: Tensor) -> Tensor:
    """Row of the table for timesteps t (any shape, float or int) -> int64, the same shape.

    row = int(t) // 10; if ANY t of the batch is >= 1000, 1 is first subtracted from EVERY int(t).
    Source: SoftREPA transformer.py. `t` is not modified in place (there it is, for int32).
    """
    index = t.long()
    index = index - (t >= NUM_TRAIN_TIMESTEPS).any().long()
    return index // TABLE_STRIDE


class SoftTokens(nn.Module):
    """The trained tensors, float32: dc_tokens and, with a table, dc_t_tokens (R, W).

    UNet: dc_tokens (N, D), W = D. MMDiT: dc_tokens (layers, N, D), W = layers * width of its text stream.
    The names are those of the official code and of its released files.
    """

    def __init__(self, tokens: Tensor, table: Tensor | None) -> None:
        super().__init__()
        self.dc_tokens = nn.Parameter(tokens.detach().clone().float())
        if table is not None and (table.ndim != 2 or len(table) != TABLE_ROWS):
            raise ValueError(f"table must have {TABLE_ROWS} rows, got {tuple(table.shape)}")
        self.dc_t_tokens = None if table is None else nn.Parameter(table.detach().clone().float())

    def offsets(self, t: Tensor) -> Tensor | None:
        """Table rows of timesteps t () or (B,) -> (1, W) or (B, W); None without a table."""
        if self.dc_t_tokens is None:
            return None
        return self.dc_t_tokens[table_row(t.to(self.dc_t_tokens.device).reshape(-1))]

    def rows(self, t: Tensor) -> Tensor:
        """The tokens of a UNet at timesteps t () or (B,), each with its table row: (1, N, D) or (B, N, D)."""
        rows, offsets = self.dc_tokens[None], self.offsets(t)
        return rows if offsets is None else rows + offsets[:, None]


def check_scale(scale: float) -> None:
    """ValueError unless the strength of an adapter is finite and >= 0."""
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be finite and >= 0, got {scale}")


def on_timestep(denoiser: nn.Module, position: int, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `see` with the timestep of every call of `denoiser`: its positional argument or its keyword."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[position] if len(args) > position else kwargs["timestep"]
        see(t if isinstance(t, Tensor) else torch.tensor(t))

    return denoiser.register_forward_pre_hook(hook, with_kwargs=True)


# ---------------------------------------------------------------- UNet


def insert_after_first(text: Tensor, tokens: Tensor) -> Tensor:
    """[text_0 ; tokens ; text_1...]: (B, L, D), (1 or B, N, D) -> (B, L + N, D) in the dtype of the text."""
    soft = tokens.to(text.device, text.dtype).expand(len(text), -1, -1)
    return torch.cat([text[:, :1], soft, text[:, 1:]], dim=1)


def selected_blocks(unet: Any, stages: str) -> list[nn.Module]:
    """The UNet's blocks with cross-attention in the stages (down, mid, up) that `stages` marks with T.

    Raises:
        ValueError: none of them has cross-attention, so that the tokens would do nothing.
    """
    parts: list[list[Any]] = [list(unet.down_blocks), [unet.mid_block], list(unet.up_blocks)]
    marked = [block for part, mark in zip(parts, stages, strict=True) if mark == "T" for block in part]
    blocks = [block for block in marked if getattr(block, "has_cross_attention", False)]
    if not blocks:
        raise ValueError(f"no block with cross-attention in the stages {stages} (down, mid, up) of this UNet")
    return blocks


@contextmanager
def inserted(
    unet: nn.Module, stages: str, soft_at: Callable[[Tensor], Tensor], scale: float = 1.0
) -> Iterator[None]:
    """Inside: every selected block attends to the soft tokens too; all else sees the plain text.

    Args:
        soft_at: timesteps -> the soft tokens, (1 or B, N, D); see `SoftTokens.rows`.
        scale: factor on the attention weight (before normalisation) of the soft tokens, >= 0. 1 is the
        trained strength, 0 exactly the model without them; other values are an attention bias of log(scale).
    Nested insertions add their tokens; no text position is encoded in cross-attention, so their order means
    nothing.
    Source: SoftREPA transformer.py, UNet forward; the scale is ours.
    """
    check_scale(scale)
    if scale == 0:
        yield
        return
    now: list[Tensor] = []

    def note(t: Tensor) -> None:
        now[:] = [soft_at(t)]

    def insert(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        soft = now[0]
        changed = {**kwargs, "encoder_hidden_states": insert_after_first(text, soft)}
        bias = kwargs.get("encoder_attention_mask")
        if scale != 1 or bias is not None:
            changed["encoder_attention_mask"] = _bias(bias, text, soft.shape[1], math.log(scale))
        return args, changed

    with ExitStack() as hooks:
        hooks.callback(on_timestep(unet, 1, note).remove)
        for block in selected_blocks(unet, stages):
            hooks.callback(block.register_forward_pre_hook(insert, with_kwargs=True).remove)
        yield


def _bias(bias: Tensor | None, text: Tensor, num: int, value: float) -> Tensor:
    """The additive attention bias (B, 1, L) of the text, lengthened by `value` for `num` soft tokens."""
    if bias is None:
        bias = text.new_zeros(len(text), 1, text.shape[1])
    soft = bias.new_full((len(bias), 1, num), value)
    return torch.cat([bias[..., :1], soft, bias[..., 1:]], dim=-1)
