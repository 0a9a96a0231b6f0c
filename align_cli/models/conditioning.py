"""What the denoiser is told at every step of a path, with adapters on the text encoders at work.

Letters: B prompts, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from align_cli.models.base import BaseModel, TextChange, TextCond


class StepText:
    """Prompts and the empty prompt, encoded for every step:

        c_i = c + sum_k scale_k (c_k - c)        over the model's text changes k that are at work at step i

    with c the model's own embedding and c_k that of change k. One change of scale w gives w c_1 + (1 - w) c,
    several the mixture of styles of TextCraftor section 4.1. Without changes it is c itself.
    """

    def __init__(
        self, model: BaseModel, prompts: Sequence[str], steps: int, *, from_step: int | None = None
    ) -> None:
        """from_step: in place of the first step that every change was made for."""
        self.model, self.prompts = model, list(prompts)
        self.changes = [
            (change.first_step(steps) if from_step is None else from_step, change)
            for change in model.text_changes
        ]
        self._own: dict[str, TextCond] = {}
        self._changed: dict[tuple[str, int], TextCond] = {}
        self._mixed: dict[tuple[str, tuple[int, ...]], TextCond] = {}

    def cond(self, i: int) -> TextCond:
        """B rows for step i."""
        return self._at(i, "cond", lambda of: of.encode(self.prompts))

    def uncond(self, i: int) -> TextCond:
        """B rows of the unconditional input for step i."""
        return self._at(i, "uncond", lambda of: of.uncond(len(self.prompts)))

    def _at(self, i: int, kind: str, changed: Callable[[TextChange], TextCond]) -> TextCond:
        active = tuple(k for k, (first, change) in enumerate(self.changes) if i >= first and change.scale)
        if (kind, active) not in self._mixed:
            own = self._base(kind)
            for k in active:
                if (kind, k) not in self._changed:
                    self._changed[kind, k] = changed(self.changes[k][1])
            terms = [(self.changes[k][1].scale, self._changed[kind, k]) for k in active]
            self._mixed[kind, active] = mix(own, terms)
        return self._mixed[kind, active]

    def _base(self, kind: str) -> TextCond:
        if kind not in self._own:
            model = self.model
            self._own[kind] = (
                model.encode_text(self.prompts) if kind == "cond" else model.uncond(len(self.prompts))
            )
        return self._own[kind]


def mix(own: TextCond, terms: Sequence[tuple[float, TextCond]]) -> TextCond:
    """own + sum of scale (other - own) over `terms`, for tokens (B, L, D) and pooled (B, P); one term of
    scale 1 is that other itself.
    """
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]

    def mixed(x: Tensor | None, others: Sequence[Tensor | None]) -> Tensor | None:
        if x is None:
            return None
        total = x
        for (scale, _), other in zip(terms, others, strict=True):
            assert other is not None
            total = total + scale * (other - x)
        return total

    tokens = mixed(own.tokens, [other.tokens for _, other in terms])
    assert tokens is not None
    return replace(own, tokens=tokens, pooled=mixed(own.pooled, [other.pooled for _, other in terms]))
