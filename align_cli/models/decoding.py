"""From latents to pictures and back: the gradient of what is made of decoded pictures, a few at a time.

Letters: B pictures, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align_cli.models.base import BaseModel

Judged = tuple[Tensor, dict[str, Tensor]]
"""Loss (), a sum over pictures, and what is reported: name -> (), a sum over pictures."""


def through_pictures(
    model: BaseModel,
    z: Tensor,
    judge: Callable[[Tensor, slice], Judged],
    *,
    chunk: int = 0,
    loss_scale: float = 1.0,
    clamp: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of decoded pictures, and its gradient with respect to the latents.

    Pictures are decoded and judged `chunk` at a time, and each graph is freed at once. That gives the
    gradient of all of them at once, since no picture's loss depends on another picture. Decoder and judge run
    in their own precision, not under autocast.

    Args:
        z: (B, C, h, w). judge: of pictures (b, 3, H, W) in [0, 1] and the rows that they are; differentiable.
        chunk: 0 takes all at once. loss_scale: factor that keeps float16 gradients in range. clamp: False
        leaves values outside [0, 1], which keep their gradient, as they are.
    Returns:
        loss (), gradient (B, C, h, w), reported sums; the loss and the sums without graph.
    """
    count = len(z)
    gradient, loss = torch.empty_like(z), z.new_zeros(())
    sums: dict[str, Tensor] = {}
    with torch.autocast(z.device.type, enabled=False), model.at_work(model.vae):
        for start in range(0, count, chunk or count):
            rows = slice(start, start + (chunk or count))
            leaf = z[rows].detach().requires_grad_()
            part, found = judge(model.decode(leaf, clamp=clamp), rows)
            (slope,) = torch.autograd.grad(part * loss_scale, leaf)
            gradient[rows] = slope / loss_scale
            loss += part.detach()
            for name, value in found.items():
                sums[name] = sums.get(name, z.new_zeros(())) + value.detach()
    return loss, gradient, sums
