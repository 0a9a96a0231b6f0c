"""A parser without any package: word lists, endings and the order of words. No grammar, no learned part.

A run of nouns and adjectives is one phrase; its last noun is what it is about, all before it describe that.
Besides, "the dog is red" and "a dog that is red" are read. Everything else stays unattached.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from align_cli.grounding import word_lists as lists
from align_cli.grounding.parsing import Word

_WORD = re.compile(r"['\u2019]s\b|\w+(?:['\u2019](?!s\b)\w+)*|[^\w\s]")
_CLOSED = {
    "AUX": lists.BE,
    "VERB": lists.AUXILIARIES,
    "DET": lists.DETERMINERS,
    "ADP": lists.PREPOSITIONS,
    "CCONJ": lists.CONJUNCTIONS,
    "NUM": lists.NUMBERS,
    "PRON": lists.OTHERS | lists.LINKS,
}
_DESCRIBING = frozenset({"", "DET", "NUM", "ADJ"})
"""What stands before a form in -ing or -ed that describes; "" is the beginning."""


class PlainParser:
    """Reads any text; a word that it does not know is a noun."""

    name = "plain"

    def parse(self, prompt: str) -> list[Word]:
        found = [(match.group(), match.start()) for match in _WORD.finditer(prompt)]
        reading = _Reading([text.lower() for text, _ in found])
        for phrase in reading.phrases:
            reading.describe(phrase)
        reading.join_copulas()
        links = zip(found, reading.tags, reading.deps, reading.heads, strict=True)
        return [Word(text, tag, dep, head, start) for (text, start), tag, dep, head in links]


@dataclass
class _Phrase:
    """A run of nouns and adjectives: indices of its words, and of its noun (None: adjectives alone).

    bound: it stands after a preposition or a verb, so that no sentence is about it.
    """

    words: list[int]
    noun: int | None
    bound: bool


@dataclass
class _Reading:
    """The words of a prompt, lower case, and what is known of them."""

    texts: list[str]
    tags: list[str] = field(init=False)
    deps: list[str] = field(init=False)
    heads: list[int] = field(init=False)
    phrases: list[_Phrase] = field(init=False)

    def __post_init__(self) -> None:
        self.tags = []
        for i in range(len(self.texts)):
            self.tags.append(_tag(self.texts, i, self.tags))
        self.deps, self.heads = ["ROOT"] * len(self.texts), list(range(len(self.texts)))
        self.phrases = _phrases(self.texts, self.tags)

    def attach(self, word: int, head: int, dep: str) -> None:
        self.heads[word], self.deps[word] = head, dep

    def describe(self, phrase: _Phrase) -> None:
        """All words of a phrase before its noun, and adverbs before adjectives."""
        for i in phrase.words:
            if self.tags[i] == "ADV":
                self.attach(i, i + 1, "advmod")
            elif phrase.noun is not None and i < phrase.noun:
                self.attach(i, phrase.noun, "amod" if self.tags[i] == "ADJ" else "compound")

    def join_copulas(self) -> None:
        """Adjectives after a form of "to be" belong to its subject, or to the noun of the relative clause."""
        for phrase in self.phrases:
            verb = phrase.words[0] - 1
            while verb >= 0 and self.texts[verb] == "not":
                verb -= 1
            if phrase.noun is not None or verb < 0 or self.tags[verb] != "AUX":
                continue
            clause = verb > 0 and self.texts[verb - 1] in lists.LINKS
            noun = self._spoken_of(verb, clause)
            if noun is None:
                continue
            if clause:
                self.attach(verb, noun, "relcl")
            else:
                self.attach(noun, verb, "nsubj")
            adjectives = [i for i in phrase.words if self.tags[i] == "ADJ"]
            for i, adjective in enumerate(adjectives):
                self.attach(adjective, adjectives[0] if i else verb, "conj" if i else "acomp")

    def _spoken_of(self, verb: int, clause: bool) -> int | None:
        """The noun before a verb that it is about: in a relative clause the nearest."""
        for phrase in reversed(self.phrases):
            if phrase.noun is not None and phrase.noun < verb and (clause or not phrase.bound):
                stops = {".", "!", "?", ";"} & set(self.texts[phrase.noun : verb])
                return None if stops else phrase.noun
        return None


def _phrases(texts: Sequence[str], tags: Sequence[str]) -> list[_Phrase]:
    phrases, i = [], 0
    while i < len(tags):
        run = _run(texts, tags, i)
        if run:
            noun = max((j for j in run if tags[j] == "NOUN"), default=None)
            before = i - 1
            while before >= 0 and tags[before] in ("DET", "NUM"):
                before -= 1
            phrases.append(_Phrase(run, noun, before >= 0 and tags[before] in ("ADP", "VERB")))
        i = run[-1] + 1 if run else i + 1
    return phrases


def _run(texts: Sequence[str], tags: Sequence[str], i: int) -> list[int]:
    """Nouns and adjectives from `i` on; "red, white and blue flag" is one run, without comma and "and"."""
    run: list[int] = []
    while True:
        while i < len(tags) and _in_phrase(tags, i):
            run.append(i)
            i += 1
        after = _past_comma_and(texts, i)
        adjectives = run and all(tags[j] != "NOUN" for j in run)
        if not adjectives or after == i or tags[after : after + 1] != ["ADJ"]:
            return run
        i = after


def _in_phrase(tags: Sequence[str], i: int) -> bool:
    return tags[i] in ("ADJ", "NOUN") or (tags[i] == "ADV" and tags[i + 1 : i + 2] == ["ADJ"])


def _past_comma_and(texts: Sequence[str], i: int) -> int:
    """Behind a comma, an "and", or both, at `i`."""
    i += texts[i : i + 1] == [","]
    return i + (i < len(texts) and texts[i] in lists.CONJUNCTIONS)


def _tag(texts: Sequence[str], i: int, tags: Sequence[str]) -> str:
    """Part of speech of word `i`, from those before it and the word itself that follows."""
    text, following = texts[i], texts[i + 1] if i + 1 < len(texts) else ""
    before = tags[-1] if tags else ""
    if not text[0].isalnum():
        return "PART" if text[1:] == "s" else "PUNCT"
    if text[0].isdigit():
        return "NUM"
    if text == "that" and not (following in lists.BE or _may_be_verb(following)):
        return "DET"
    if _is_side(texts, i):
        return "ADP"
    for tag, words in _CLOSED.items():
        if text in words:
            return tag
    if _is_adverb(text):
        return "ADV"
    opening = next((tag for tag in reversed(tags) if tag != "ADV"), "")
    named = following[:1].isalpha() and not (_is_closed(following) or _is_side(texts, i + 1))
    if _is_adjective(text):
        joined = before == "CCONJ" and tags[-2:-1] != ["ADJ"]
        goes_on = following in lists.CONJUNCTIONS and texts[i + 2 : i + 3] and _is_adjective(texts[i + 2])
        ends = not named and not goes_on and (joined or before in ("DET", "ADJ", "NOUN", "NUM", "ADP"))
        return "NOUN" if text in lists.EITHER and ends else "ADJ"
    if text.endswith("ing") and len(text) > 4 and text not in lists.NOUNS_IN_ING:
        return "ADJ" if named and opening in _DESCRIBING else "VERB"
    if text.endswith("ed") and len(text) > 3 and text not in lists.NOUNS_IN_ED:
        joined = before == "CCONJ" and tags[-2:-1] == ["ADJ"]
        return "ADJ" if named and (opening in _DESCRIBING or opening == "ADP" or joined) else "VERB"
    if _may_be_verb(text) and opening not in _DESCRIBING and (before != "ADP" or texts[i - 1] == "to"):
        previous = texts[i - 1]
        plural = previous in lists.PLURALS or previous.endswith("s") or before != "NOUN"
        if text in lists.VERBS or plural:
            return "VERB"
    return "NOUN"


def _is_side(texts: Sequence[str], i: int) -> bool:
    """Whether "left of" or "right of" stands there."""
    return texts[i] in ("left", "right") and list(texts[i + 1 : i + 2]) == ["of"]


def _may_be_verb(text: str) -> bool:
    return text in lists.VERBS or text in lists.PLURAL_VERBS


def _is_closed(text: str) -> bool:
    return any(text in words for words in _CLOSED.values()) or _is_adverb(text)


def _is_adverb(text: str) -> bool:
    return text in lists.ADVERBS or (text.endswith("ly") and text not in lists.NOT_ADVERBS)


def _is_adjective(text: str) -> bool:
    ending = text.endswith(lists.ADJECTIVE_ENDINGS) and text not in lists.NOT_ADJECTIVES
    return ending or text in lists.ADJECTIVES or text in lists.EITHER
