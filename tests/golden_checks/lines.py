"""One compared quantity, and how it is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORWARD, DERIVED = 1e-5, 1e-4
"""Tolerances relative to max |expected|: forward passes and losses; sampling and gradients. Source: the case
files.
"""


@dataclass(frozen=True)
class Line:
    """One compared quantity."""

    quantity: str
    error: float
    tol: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tol  # False for NaN


def compare(quantity: str, got: Tensor, expected: Tensor, relative: float) -> Line:
    """Largest absolute difference against relative * max |expected|; infinite if the shapes differ."""
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    if got.shape != expected.shape:
        if got.numel() != 1 or expected.numel() != 1:
            return Line(
                f"{quantity} (shape {list(got.shape)}, expected {list(expected.shape)})", math.inf, 0.0
            )
        got = got.reshape(expected.shape)
    error = float((got.detach().double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return Line(quantity, error, relative * scale)


def close(quantity: str, got: Tensor, expected: Tensor, *, atol: float, rtol: float) -> Line:
    """Each value within rtol of itself plus atol, and NaN just where NaN is expected; the line shows the one
    that is nearest to the border, or beyond it.
    """
    line = compare(quantity, got.nan_to_num(), expected.nan_to_num(), rtol)
    if not math.isfinite(line.error):
        return line
    got = got.reshape(expected.shape).detach().double()
    if not torch.equal(got.isnan(), expected.isnan()):
        return Line(f"{quantity} (NaN elsewhere)", math.inf, 0.0)
    error = (got - expected.double()).nan_to_num().abs().flatten()
    if not len(error):
        return Line(quantity, 0.0, atol)
    allowed = atol + rtol * expected.double().nan_to_num().abs().flatten()
    worst = int((error - allowed).argmax())
    return Line(quantity, float(error[worst]), float(allowed[worst]))


def same(quantity: str, got: object, expected: object) -> Line:
    """Exact equality."""
    text = quantity if got == expected else f"{quantity} (got {got}, expected {expected})"
    return Line(text, 0.0 if got == expected else math.inf, 0.0)


@dataclass(frozen=True)
class Kind:
    """A kind of case. method: its name in the output. fits: does the content of a case.json, in its folder,
    belong here? check: the lines of such a case.
    """

    method: str
    fits: Callable[[Path, dict[str, Any]], bool]
    check: Callable[[Path, dict[str, Any]], Iterator[Line]]
