"""Why a method does not apply to a family of models. That it does, its class says (`families`)."""

from __future__ import annotations

NOT_APPLICABLE = {
    ("longalign", "sd3"): (
        "SD3 reads T5 with up to 512 tokens already, and its CLIP states stand before those of T5, not in "
        "the segments that LongAlign places side by side"
    ),
}
"""(method, family) -> the reason."""


def why_not(method: str, family: str) -> str:
    """The reason; empty where there is none to give."""
    return NOT_APPLICABLE.get((method, family), "")
