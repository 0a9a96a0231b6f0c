"""Other weights in place of a module's own ones, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

_MOVED = "_t2ialign_own_weights"
"""Attribute of a module whose weights are moved: its own ones."""


@contextmanager
def moved_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters that `weights` names have these values; blocks may be nested.

    weights: parameter -> value of the same shape, dtype and device.
    """
    # the parameters themselves: another library may wrap their layers, and so rename them, meanwhile
    parameters = dict(module.named_parameters())
    held = {name: p.data for name, p in parameters.items()}
    untouched = own_weights(module) is None
    try:
        _put(parameters, weights)
        if untouched:
            setattr(module, _MOVED, held)
        yield
    finally:
        _put(parameters, held)
        if untouched:
            delattr(module, _MOVED)


def own_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Inside `moved_weights`: parameter -> the module's own value. None outside."""
    return getattr(module, _MOVED, None)


def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        if name in values:
            p.data = values[name]
