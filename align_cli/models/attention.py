"""Attention maps: how much every position of the picture looks at a token of the prompt.

A UNet has cross-attention, whose probabilities these are. In SD3 picture and text attend to each other as one
sequence; there a map is of the attention that goes to the rows of the first text encoders (CLIP) alone:

    map = softmax over the CLIP rows of (q_picture . k_text / sqrt(d))

which is what the softmax over all keys gives to these rows, divided by its sum over them. So a map says which
words a position looks at, as in a UNet, and not how much it looks at text rather than at the picture; a loss
of it cannot be lowered by looking away from the picture, and no softmax over all keys has to be kept. The
words that T5 reads once more have no maps.

Letters: B rows, H heads, r side of a map, N = r r positions, L tokens, P kept tokens, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align_cli.errors import UserError

PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
"""First word of a module's name in a UNet -> place of its maps."""
JOINT = "joint"
"""Place of the maps of all blocks of SD3."""


class AttentionMaps:
    """What one call of the denoiser keeps: `maps`, by the names of CoMat's train layers, "<place>_<r>"
    (mid_8, up_16, ..., of SD3 joint_64), one for each transformer layer there, in the order of the
    computation.

    Source: CoMat, attn_utils (maps of mid and up blocks), from TokenCompose.
    """

    def __init__(self, layers: Collection[str] = (), positions: Tensor | None = None) -> None:
        """layers: names that are kept; empty for all but those of the place down. positions: (B, P) int64,
        the tokens that are kept of each row; None for all.
        """
        self.layers, self.positions = frozenset(layers), positions
        self.maps: dict[str, list[Tensor]] = {}
        """Layer -> (B, H, r, r, P) each, with their graph."""
        self.rows = slice(None)
        """Of SD3: rows of its text that maps are of."""
        self.closed = False
        """After the call, so that parts of it that are computed again in the backward pass add nothing."""

    def wants(self, place: str, side: int) -> bool:
        """Whether maps of this place and side are kept."""
        name = f"{place}_{side}"
        return name in self.layers if self.layers else place != "down"

    def add(self, place: str, probabilities: Tensor) -> None:
        """Keep (B, H, N, L)."""
        kept = probabilities
        if self.positions is not None:
            rows = self.positions[:, None, None].expand(-1, *kept.shape[1:3], -1)
            kept = kept.gather(-1, rows)
        side = math.isqrt(kept.shape[2])
        if not self.closed:
            self.maps.setdefault(f"{place}_{side}", []).append(kept.unflatten(2, (side, side)))


class _Watched:
    """A processor of attention that keeps its probabilities where it is asked for them, else another one."""

    def __init__(self, place: str, processor: Any) -> None:
        self.place, self.processor = place, processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        keep: AttentionMaps | None = None,
        **more: Any,
    ) -> Tensor:
        side = math.isqrt(hidden_states.shape[1])
        if keep is None or encoder_hidden_states is None or not keep.wants(self.place, side):
            found: Tensor = self.processor(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **more
            )
            return found
        rows, length = encoder_hidden_states.shape[:2]
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(f(encoder_hidden_states)) for f in (attn.to_k, attn.to_v))
        mask = attn.prepare_attention_mask(attention_mask, length, rows)
        probabilities = attn.get_attention_scores(query, key, mask)
        keep.add(self.place, probabilities.unflatten(0, (rows, -1)))
        mixed = attn.batch_to_head_dim(torch.bmm(probabilities.to(value.dtype), value))
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


class _WatchedJoint:
    """A processor of SD3's joint attention beside which maps are computed where it is asked for them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keep: AttentionMaps | None = None,
    ) -> Any:
        side = math.isqrt(hidden_states.shape[1])
        if keep is not None and encoder_hidden_states is not None and keep.wants(JOINT, side):
            text = encoder_hidden_states[:, keep.rows]
            query, key = (
                layer(rows).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                for layer, rows in ((attn.to_q, hidden_states), (attn.add_k_proj, text))
            )
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_added_k is None else attn.norm_added_k(key)
            scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
            keep.add(JOINT, scores.softmax(-1))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


@contextmanager
def watched(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a call of the denoiser with cross_attention_kwargs (of SD3 joint_attention_kwargs) {"keep":
    AttentionMaps} fills these; every other call is as outside. The backward pass belongs inside where
    activations are computed again in it.
    """
    net: Any = denoiser
    before = dict(net.attn_processors)
    joint = hasattr(net, "transformer_blocks")
    try:
        net.set_attn_processor(
            {
                name: _WatchedJoint(one) if joint else _Watched(PLACES[name.partition(".")[0]], one)
                for name, one in before.items()
            }
        )
        yield
    finally:
        net.set_attn_processor(before)


def layer_names(denoiser: nn.Module, side: int) -> list[str]:
    """The layers that a denoiser has maps of for a latent of this side: of a UNet down to the middle and up
    again; one name for all blocks of SD3.
    """
    net: Any = denoiser
    if hasattr(net, "transformer_blocks"):
        return [f"{JOINT}_{side // int(net.config.patch_size)}"]
    blocks = [("down", b) for b in net.down_blocks] + [("mid", net.mid_block)]
    found: dict[str, None] = {}
    for place, block in [*blocks, *(("up", b) for b in net.up_blocks)]:
        if getattr(block, "has_cross_attention", False):
            found[f"{place}_{side}"] = None
        if getattr(block, "downsamplers", None):
            side = (side + 1) // 2
        if getattr(block, "upsamplers", None):
            side *= 2
    return list(found)


def check_layers(denoiser: nn.Module, layers: Collection[str], side: int, setting: str, model: str) -> None:
    """UserError, about `setting`, for a layer that `model` has not with latents of this side."""
    there = layer_names(denoiser, side)
    for name in layers:
        if name not in there:
            raise UserError(
                f"{setting}: {model} has no cross-attention {name} at this picture size (it has "
                f"{', '.join(there)})"
            )
