"""What tokenizers leave of prompts that are too long for a text encoder or a scorer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width


@dataclass(frozen=True)
class Cut:
    """What a tokenizer leaves of one prompt. limit: tokens that are read, start and end included; 0 for a
    reader without such a limit. tokens: of the prompt, counted the same way. lost: the words that are cut, as
    the user wrote them, from the first that is not read to its end; "" if nothing is.
    """

    limit: int
    tokens: int
    lost: str


def cuts(tokenizer: Any, limit: int, prompts: Sequence[str], before: str = "") -> list[Cut]:
    """What a tokenizer cuts from each prompt.

    Args:
        tokenizer: a transformers tokenizer that knows the offsets of its tokens (`is_fast`).
        limit: tokens that the model reads, start and end included.
        before: what the model reads in front of every prompt; it counts, but is never lost.
    """
    return [_cut(tokenizer, limit, prompt, before) for prompt in prompts]


def _cut(tokenizer: Any, limit: int, prompt: str, before: str) -> Cut:
    text = before + prompt
    tokens = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    if tokens <= limit:
        return Cut(limit, tokens, "")
    kept = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
    seen = max((end for start, end in kept["offset_mapping"] if end > start), default=0)
    while 0 < seen < len(text) and _in_word(text[seen - 1]) and _in_word(text[seen]):
        seen -= 1  # half a word is a lost word
    return Cut(limit, tokens, prompt[max(seen - len(before), 0) :].strip())


def _in_word(character: str) -> bool:
    """Is it a letter or digit of a script that puts blanks between words?"""
    return character.isalnum() and east_asian_width(character) not in ("W", "F")
