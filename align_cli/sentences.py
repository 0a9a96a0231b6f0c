"""Long captions, sentence by sentence: they are scored, and encoded, so. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ENDS = re.compile(r'"!|\.|\?|;"')
"""The official pattern to the letter: a bare "!" or ";" ends no sentence. Source: LongAlign tools.py."""

_CLOSING = "\"')\\]}\u201d\u2019\u00bb"
"""What may stand between the mark of a sentence and its end."""
_STOPS = re.compile(
    rf"""(?P<mark>[.!?;\u2026]+)[{_CLOSING}]*   # of western scripts, with the quotes that it closes
      | [\u3002\uff01\uff1f\uff1b]+[{_CLOSING}\u300d\u300f]*   # of Chinese and Japanese
      | [\r\n]+""",
    re.VERBOSE,
)
_WHOLE = re.compile(
    r"(?:https?://|www\.)[^\s<>\"]*[^\s<>\"'.,;:!?)\]]"  # an address, without the mark that ends the sentence
    r"|[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,8}"
    r"|\b[\w-]{1,64}(?:\.[\w-]{1,64}){0,8}\.(?:com|org|net|edu|gov|io|jpe?g|png|gif|html?)\b"
)
"""What has marks inside that end nothing: web and mail addresses, names of files."""

_TITLES = {
    "dr", "mr", "mrs", "ms", "prof", "st", "mt", "fig", "figs", "vol", "vs", "e.g", "i.e", "eg", "ie",
    "cf", "ca", "approx", "gen", "col", "capt", "lt", "sgt", "rev", "hon",
}  # fmt: skip
"""Abbreviations that more has to follow."""
_OTHERS = {
    "etc", "al", "jr", "sr", "inc", "ltd", "co", "dept", "est", "ft", "in", "lb", "lbs", "oz", "ave",
    "blvd", "rd", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
}  # fmt: skip
"""Abbreviations that may be the end: they are if a capital follows."""
_WORD = re.compile(r"[^\W_][\w.]*$")
_LETTERS = re.compile(r"\w(?:\.\w)+")
"""p.m, U.S.A"""
_SEEN = 24
"""Characters before a full stop that are looked at."""
_BLANKS = re.compile(r"\s*")


def split_sentences(text: str) -> list[str]:
    """The segments of a text: each is closed by one full stop whatever its own mark was, blanks stay.

    Never empty: a text of marks alone, and the empty one, is its own only segment.
    Source: LongAlign tools.py, collate_fn. Deviations: none.
    """
    return [f"{part}." for part in _ENDS.split(text) if part] or [text]


def split_better(text: str) -> list[str]:
    """The sentences of a text as a reader sees them, each with its own mark and without blanks around it.

    They end at . ! ? ; and at ends of lines, also at the stops of Chinese and Japanese; not inside numbers,
    common abbreviations, initials, addresses and names of files, nor at an ellipsis that goes on in small
    letters.
    Never empty: a text of blanks alone gives the empty text.
    """
    whole = [found.span() for found in _WHOLE.finditer(text)]
    parts, start, at = [], 0, 0
    for stop in _STOPS.finditer(text):
        while at < len(whole) and whole[at][1] <= stop.start():
            at += 1
        inside = at < len(whole) and whole[at][0] <= stop.start()
        if not inside and _ends(text, start, stop):
            parts.append(text[start : stop.end()])
            start = stop.end()
    parts.append(text[start:])
    found = [part.strip() for part in parts]
    return _joined([part for part in found if part]) or [""]


def _ends(text: str, start: int, stop: re.Match[str]) -> bool:
    """Whether a sentence that began at `start` ends at this mark."""
    mark, end = stop["mark"], stop.end()
    blanks = _BLANKS.match(text, end)
    assert blanks is not None
    following = text[blanks.end() : blanks.end() + 1]
    if mark is None or not following or any(c in "!?;" for c in mark):
        return True
    if mark != "." or stop.group() != mark:  # an ellipsis, or "stop." he said
        return blanks.end() > end and not following.islower()
    if blanks.end() == end:  # 3.5, p.m, U.S.A; but "one.Two" had the end of a line in it
        return (
            text[stop.start() - 1].islower() and following.isupper() and not text[end + 1 : end + 2].isupper()
        )
    word = _WORD.search(text, max(start, stop.start() - _SEEN), stop.start())
    last = "" if word is None else word.group()
    if last.lower() in _TITLES or (last in ("No", "no") and following.isdigit()):
        return False
    if len(last) == 1 and last.isupper() and last != "I":  # an initial
        return False
    return following.isupper() or not (last.lower() in _OTHERS or _LETTERS.fullmatch(last))


def _joined(parts: list[str]) -> list[str]:
    """Marks alone belong to the sentence before them."""
    found: list[str] = []
    for part in parts:
        if found and not any(c.isalnum() for c in part) and part.isascii():
            found[-1] += part
        else:
            found.append(part)
    return found


SPLITTERS: dict[str, Callable[[str], list[str]]] = {"official": split_sentences, "sentences": split_better}
"""How a caption falls into sentences: as in the official code, which released weights know; or better."""


def starts(text: str, parts: Sequence[str]) -> list[int]:
    """Where in a text each of its sentences begins, as a splitter gave them."""
    found, at = [], 0
    for part in parts:
        at = max(text.find(part[:-1], at), at)  # the mark may be another
        found.append(at)
        at += max(len(part) - 1, 0)
    return found


def drop_captions(captions: Sequence[str], share: float, draw: Callable[[], float]) -> list[str]:
    """The captions, a share of them in place of which stands the empty text.

    draw: a number in [0, 1) for each caption in turn; it is kept where that is >= `share`.
    Source: LongAlign tools.py, collate_fn.
    """
    return [text if draw() >= share else "" for text in captions]
