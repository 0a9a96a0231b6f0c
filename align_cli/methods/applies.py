"""Why a method does not apply to a family of models. That it does, its class says (`families`)."""

from __future__ import annotations

from collections.abc import Iterable

NOT_APPLICABLE = {
    ("longalign", "sd3"): (
        "SD3 reads T5 with up to 512 tokens already, and its CLIP states stand before those of T5, not in "
        "the segments that LongAlign places side by side"
    ),
}
"""(method, family) -> the reason."""


def why_not_alias(method: str, aliases: Iterable[str]) -> str:
    """The reason for a model with these aliases, which begin with its family; empty if there is none."""
    names = [alias.removeprefix("tiny-") for alias in aliases]
    found = (reason for (one, family), reason in NOT_APPLICABLE.items()
             if one == method and any(name.startswith(family) for name in names))  # fmt: skip
    return next(found, "")


def why_not(method: str, family: str) -> str:
    """The reason; empty where there is none to give."""
    return NOT_APPLICABLE.get((method, family), "")
