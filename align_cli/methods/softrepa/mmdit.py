"""How an MMDiT (SD3) gets to see its soft tokens: each of its first blocks has its own, in front of the text.

Hooks before and after the blocks put them in and take them out again, so the model itself is never changed.

Letters: B batch, L text rows, N soft tokens, D width of the tokens, P width of the text stream (D = P, or the
width of the text encoders), S picture rows, Y blocks with tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from align_cli.methods.softrepa.tokens import SoftTokens, check_scale, on_timestep

BLOCK_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")
"""What a JointTransformerBlock is called with; by position where gradients are checkpointed."""


def block_tokens(transformer: Any, tokens: SoftTokens, t: Tensor, *, projected: bool) -> Tensor:
    """Soft tokens in the text stream, (Y, 1 or B, N, P), for timesteps t () or (B,).

    Tokens of the text encoders' width first pass the frozen context_embedder; those that are `projected`
    already do not. Then block y adds columns y P to (y + 1) P of the table row.
    Source: SoftREPA transformer.py, MMDiT forward.
    """
    soft: Tensor = tokens.dc_tokens
    if not projected:
        embedder = transformer.context_embedder
        soft = embedder(soft.to(embedder.weight))
    soft, offsets = soft[:, None], tokens.offsets(t)
    if offsets is None:
        return soft
    return soft + offsets.unflatten(1, (len(soft), -1)).transpose(0, 1)[:, :, None].to(soft.device)


@contextmanager
def inserted_per_block(
    transformer: nn.Module, soft_at: Callable[[Tensor], Tensor], layers: int, scale: float = 1.0
) -> Iterator[None]:
    """Inside: block y of the transformer attends to its soft tokens too; between blocks the text has L rows.

    Args:
        soft_at: timesteps -> the soft tokens in the text stream, (Y, 1 or B, N, P); see `block_tokens`.
        layers: Y.
        scale: factor on the attention weight (before normalisation) of the soft tokens, >= 0. 1 is the
        trained strength, 0 exactly the model without them; other values are an attention bias of log(scale).
    Nested insertions add their tokens; the MMDiT encodes no text position, so their order means nothing.
    Leave the block only after the backward pass: recomputed (checkpointed) blocks need the tokens, too.
    Source: SoftREPA transformer.py, MMDiT forward; there, every block drops the tokens of the one before. The
    scale is ours.
    """
    check_scale(scale)
    if scale == 0:
        yield
        return
    model: Any = transformer
    blocks = list(model.transformer_blocks)[:layers]
    now: list[Tensor] = []

    def note(t: Tensor) -> None:
        now[:] = [soft_at(t)]

    def prepend(
        index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = dict(zip(BLOCK_ARGUMENTS, args, strict=False)) | kwargs
        text = call["encoder_hidden_states"]
        soft = now[0][index].to(text.device, text.dtype).expand(len(text), -1, -1)
        call["encoder_hidden_states"] = torch.cat([soft, text], dim=1)
        more = call.get("joint_attention_kwargs") or {}
        bias = more.get("attention_mask")
        if scale != 1 or bias is not None:
            bias = text.new_zeros(text.shape[1]) if bias is None else bias
            longer = torch.cat([bias.new_full((soft.shape[1],), math.log(scale)), bias])
            call["joint_attention_kwargs"] = {**more, "attention_mask": longer}
        return (), call

    def drop(
        _block: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor | None, Tensor]
    ) -> tuple[Tensor | None, Tensor]:
        text, picture = output
        num = now[0].shape[-2]
        return None if text is None else text[:, num:], picture  # the last block of a model returns no text

    with ExitStack() as stack:
        stack.callback(on_timestep(transformer, 3, note).remove)
        for index, block in enumerate(blocks):
            if scale != 1:
                stack.enter_context(_heeding_bias(block.attn))
            before = block.register_forward_pre_hook(
                lambda _block, args, kwargs, index=index: prepend(index, args, kwargs), with_kwargs=True
            )
            stack.callback(before.remove)
            stack.callback(block.register_forward_hook(drop).remove)
        yield


# ---------------------------------------------------------------- strength


class BiasedJointAttention:
    """diffusers' JointAttnProcessor2_0, which ignores `attention_mask`, with a bias on the text keys.

    attention_mask: (L,) added to the attention logits of every query; None is the original.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, S, P) and (B, L, P) -> the same shapes."""
        picture = _heads(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        text = _heads(
            attn,
            encoder_hidden_states,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
        )
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(picture, text, strict=True))
        bias = None
        if attention_mask is not None:
            bias = F.pad(attention_mask, (hidden_states.shape[1], 0)).to(query.dtype)[None, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        seen, read = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            read = attn.to_add_out(read)
        return attn.to_out[1](attn.to_out[0](seen)), read


def _heads(
    attn: Any, rows: Tensor, projections: tuple[str, str, str], norms: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one stream, (B, heads, rows, width of a head) each."""
    query, key, value = (
        getattr(attn, name)(rows).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in projections
    )
    norm_query, norm_key = (getattr(attn, name) for name in norms)
    query = query if norm_query is None else norm_query(query)
    return query, key if norm_key is None else norm_key(key), value


@contextmanager
def _heeding_bias(attn: Any) -> Iterator[None]:
    """Inside: this joint attention heeds an additive bias."""
    given = attn.processor
    if not isinstance(given, JointAttnProcessor2_0 | BiasedJointAttention):
        raise ValueError(f"a scale other than 0 and 1 does not work with a {type(given).__name__}")
    attn.set_processor(BiasedJointAttention())
    try:
        yield
    finally:
        attn.set_processor(given)
