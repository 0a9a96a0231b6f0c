"""Rewards by name and weight, as settings and flags write them. Importing this costs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align_cli import registry
from align_cli.checks import require
from align_cli.errors import UserError

NO_GRADIENT = ("shapes",)
"""Registered scorers that say nothing about how to change a picture."""


def parse_weights(texts: Sequence[str], option: str = "--reward") -> dict[str, float]:
    """ "NAME=WEIGHT" texts -> name -> weight. UserError for anything else, or a name given twice."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            what = "the weight must be a finite number" if name and number else "write NAME=WEIGHT"
            raise UserError(f"{option} {text}: {what}, for example {option} hpsv2=100")
        if name in found:
            raise UserError(f"{option} {text}: {name} is given twice")
        found[name] = weight
    return found


def parse_places(texts: Sequence[str], option: str = "--weights") -> dict[str, str]:
    """ "NAME=PATH" texts -> name -> hub id, folder or file. UserError for anything else."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise UserError(
                f"{option} {text}: write {option} NAME=PATH, for example {option} clip=clip-folder"
            )
        registry.path_of(registry.REWARDS, name)
        if name in found:
            raise UserError(f"{option} names {name} twice")
        found[name] = place
    return found


def check_weights(key: str, weights: Mapping[str, float]) -> None:
    """UserError unless these are rewards that can be trained on.

    key: the setting that holds them.
    Raises:
        UserError: an unknown reward, one without gradient, a weight that is not finite, or weights whose sum
        is not above 0.
    """
    for name in weights:
        registry.path_of(registry.REWARDS, name)
        require(
            name not in NO_GRADIENT,
            f"{key}: {name} judges pictures without a gradient, so that nothing can be trained on it; "
            "use it in the evaluation",
        )
    require(
        all(map(math.isfinite, weights.values())) and sum(weights.values()) > 0,
        f"{key}: the weights must be finite and their sum above 0, got "
        + (", ".join(f"{name}={weight:g}" for name, weight in weights.items()) or "none"),
    )
