"""What tokenizers leave of prompts that are too long for a text encoder or a scorer. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

from align_cli.sentences import starts


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
    return Cut(limit, tokens, prompt[max(_whole_words(text, seen) - len(before), 0) :].strip())


def segment_cuts(
    tokenizer: Any,
    limit: int,
    length: int,
    prompts: Sequence[str],
    split: Callable[[str], list[str]],
    dropped: Collection[int],
) -> list[Cut]:
    """What is cut from prompts that are read sentence by sentence: the ends of long sentences, and of all.

    Args:
        limit: tokens of one sentence that the model reads, start and end included.
        length: tokens of a whole prompt that are kept; the limit of the cuts.
        dropped: ids of tokens that are not kept, that of the end among them.
    """
    return [_segment_cut(tokenizer, limit, length, prompt, split(prompt), dropped) for prompt in prompts]


def _segment_cut(
    tokenizer: Any, limit: int, length: int, prompt: str, parts: list[str], dropped: Collection[int]
) -> Cut:
    tokens = filled = 0
    lost: list[str] = []
    full = False
    for part, begin in zip(parts, starts(prompt, parts), strict=True):
        found = tokenizer(part, truncation=False, verbose=False, return_offsets_mapping=True)
        kept = [i for i, token in enumerate(found["input_ids"]) if token not in dropped]
        fit = [i for i in kept if i < limit - 1]
        read = fit[: length - filled]
        tokens, filled = tokens + len(kept), filled + len(read)
        if len(read) < len(kept) and not full:
            full = len(read) < len(fit)
            seen = max((found["offset_mapping"][i][1] for i in read), default=0)
            end = len(prompt) if full else begin + len(part)
            lost.append(prompt[begin + _whole_words(part, seen) : end].strip())
    return Cut(length, tokens, " ... ".join(text for text in lost if text))


def _whole_words(text: str, seen: int) -> int:
    """Where the last word that is read completely ends: half a word is a lost word. seen: characters read."""
    while 0 < seen < len(text) and _in_word(text[seen - 1]) and _in_word(text[seen]):
        seen -= 1
    return seen


def _in_word(character: str) -> bool:
    """Is it a letter or digit of a script that puts blanks between words?"""
    return character.isalnum() and east_asian_width(character) not in ("W", "F")
