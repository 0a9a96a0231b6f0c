"""Classifier-free guidance around any predictor.

Letters: B batch, C H W latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, cat


class Conditions(Protocol):
    """Rows of conditioning that can be joined; `TextCond` of models/base.py is one."""

    @staticmethod
    def cat(parts: list[Any]) -> Any: ...


Cond = TypeVar("Cond", bound=Conditions)


def guided(
    predict: Callable[[Tensor, Tensor, Cond], Tensor], s: float
) -> Callable[[Tensor, Tensor, Cond, Cond | None, Tensor | None], Tensor]:
    """g(z, t, cond, uncond, shift) = u + s (c - u), with c and u from one call on 2B rows, the unconditional
    half first. A shift is added to the latent that the conditional half sees.

    s == 1 returns c and skips the unconditional half; then `uncond` may be None.
    Source: Ho and Salimans, arXiv 2207.12598, in the form u + s (c - u) of Stable Diffusion.
    """

    def combined(
        z: Tensor, t: Tensor, cond: Cond, uncond: Cond | None, shift: Tensor | None = None
    ) -> Tensor:
        told = z if shift is None else z + shift
        if s == 1:
            return predict(told, t, cond)
        if uncond is None:
            raise ValueError(f"guidance {s} needs an unconditional input")
        u, c = predict(cat([z, told]), t, type(cond).cat([uncond, cond])).chunk(2)
        return u + s * (c - u)

    return combined
