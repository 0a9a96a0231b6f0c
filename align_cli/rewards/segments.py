"""LongAlign's sentences: a long caption is scored, and encoded, sentence by sentence."""

from __future__ import annotations

import re

_ENDS = re.compile(r'"!|\.|\?|;"')
"""The official pattern to the letter: a bare "!" or ";" ends no sentence. Source: LongAlign tools.py."""


def split_sentences(text: str) -> list[str]:
    """The segments of a text: each is closed by one full stop whatever its own mark was, blanks stay.

    Never empty: a text of marks alone, and the empty one, is its own only segment.
    Source: LongAlign tools.py, collate_fn. Deviations: none.
    """
    return [f"{part}." for part in _ENDS.split(text) if part] or [text]
