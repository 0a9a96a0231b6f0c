"""The n x n step in the memory of a few pairs, with no pair computed twice.

What a pair's error weighs in the loss is known only when all errors of its image are. So every pair gets a
copy of the soft tokens for itself; one backward pass over a chunk of pairs then gives the gradient of each
error apart, and soft tokens are so few that these can wait until their image is through:

    dL/dsoft = sum_ij dL/dE_ij dE_ij/dsoft

which is the gradient of the whole batch in one graph.

Letters: I images, T candidate texts of each, P pairs of a chunk, N soft tokens, W their width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pair_gradient(
    errors: Callable[[Tensor, Tensor, Tensor], Tensor],
    soft: Tensor,
    texts_IT: Tensor,
    loss_of: Callable[[Tensor, slice], Tensor],
    *,
    chunk: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss that is a sum over images, and its gradient with respect to the soft tokens.

    Args:
        errors: (soft (..., P, N, W), image numbers (P,), text numbers (P,)) -> errors (P,) with a graph.
        soft: (..., 1, N, W). texts_IT: (I, T) int64, the text numbers of every image.
        loss_of: (errors (R, T) of the images in a slice, the slice) -> their () share of the loss.
        chunk: P; 0 for all pairs at once. scale: factor on gradients while they may be in float16.
    Returns:
        errors (I, T) float32; loss () float32; gradient, at least float32 and shaped as `soft`. All detached.
    """
    width, device = texts_IT.shape[1], texts_IT.device
    texts, total = texts_IT.flatten(), texts_IT.numel()
    found = torch.empty(total, device=device)
    fine = torch.promote_types(soft.dtype, torch.float32)
    loss, gradient = torch.zeros((), device=device), torch.zeros_like(soft, dtype=fine)
    waiting = gradient.narrow(-3, 0, 0)
    done = 0
    for start in range(0, total, chunk or total):
        pairs = torch.arange(start, min(start + (chunk or total), total), device=device)
        own = soft.detach().to(fine).expand(*soft.shape[:-3], len(pairs), *soft.shape[-2:])
        own = own.clone().requires_grad_()
        err = errors(own, pairs // width, texts[pairs])
        found[pairs] = err.detach().float()
        with torch.autocast(device.type, enabled=False):  # weights over the scale are too small for float16
            (slope,) = torch.autograd.grad(err.sum() * scale, own)
            waiting = torch.cat([waiting, slope], dim=-3)
            rows = slice(done, (start + len(pairs)) // width)
            if rows.stop == done:
                continue
            whole = found[done * width : rows.stop * width].view(-1, width).clone().requires_grad_()
            part = loss_of(whole, rows)
            weight = torch.autograd.grad(part, whole)[0].flatten() / scale
            ready, waiting = waiting.split([len(weight), waiting.shape[-3] - len(weight)], dim=-3)
            gradient += torch.einsum("p,...pnw->...nw", weight.to(fine), ready).unsqueeze(-3)
            loss += part.detach()
            done = rows.stop
    return found.view_as(texts_IT), loss, gradient
