"""The things of a prompt that have attributes, and the token positions of their words.

Source: CoMat attribute_concen_utils.py, AttrConcenTrainableSDPipeline.py. `official=True` follows it to the
letter. Deviations otherwise:
- words are found by their place in the prompt, so capitals and accents do no harm, and of two equal words
  each has its own positions; the official code compares with the lower-case pieces of the tokenizer, and
  loses them;
- of "the dog is red" the noun is dog; the official code takes the last word, red;
- relative clauses of every noun are read, not of the first alone; what is said of one noun in several ways
  is one entity; entities stand in the order of the prompt (`groups.attributed`).
What the text encoder does not read is left out: attributes, and entities whose noun it is, as though the
prompt ended there (official: in the end, every entity of which it does not read all words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import CLIPTokenizer

from align_cli.grounding.groups import (
    attributed,
    by_copula,
    by_modifier,
    by_relative_clause,
    kept,
    unified,
)
from align_cli.grounding.parsing import Parser, Word

STOP_LIST = frozenset({
    "scene", "surface", "area", "atmosphere", "noise", "place", "kitchen", "dream", "interior",
    "exterior", "meal", "background", "bathroom", "room", "scent", "street", "hillside", "mountain",
    "sky", "sea", "ocean", "lost", "language", "skill", "one", "night", "day", "morning", "space",
    "environment", "conditions", "field", "shore", "restroom", "party", "grass", "snow", "meadow",
    "water", "shadow", "waves", "song", "cycle", "sunlight", "mysteries", "wall", "salon", "range",
    "cry", "speech", "tone", "thing", "about", "activity", "air", "advertisement", "airport",
    "also",
})  # fmt: skip
"""Nouns that no detector should be asked for, as they are or in front of a last letter.
Source: AttrConcenTrainableSDPipeline.py.
"""
CONTENT = frozenset({"NOUN", "PROPN", "ADJ", "VERB"})
"""Parts of speech that are worth a look where no noun has an attribute."""
LONGEST = 10_000
"""Characters of a prompt that are parsed: far more than any text encoder reads."""
REMEMBERED = 65_536
"""Prompts whose entities are kept."""

Place = int | list[int]
"""Position of a word, or positions of its pieces."""


@dataclass(frozen=True)
class Entity:
    """A noun with its attributes.

    noun: what the detector is asked for, lower case. positions: token positions of its words, those of the
    noun last; 0 is the begin token. words: its words as they stand in the prompt (official: as the tokenizer
    has them), the noun last.
    """

    noun: str
    positions: tuple[int, ...]
    words: tuple[str, ...]


class EntityReader:
    """Entities of prompts; each prompt is parsed once.

    parser: of `load_parser`. tokenizer: of the text encoder whose attention is looked at (SDXL: the first).
    limit: tokens that the encoder reads, begin and end included (`models.frozen.clip_limit`). official: as
    the official code finds them, with what it loses.
    """

    def __init__(
        self, parser: Parser, tokenizer: CLIPTokenizer, *, limit: int, official: bool = False
    ) -> None:
        self.parser, self.tokenizer, self.limit, self.official = parser, tokenizer, limit, official
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._read)

    def entities(self, prompt: str) -> list[Entity]:
        """None for a prompt without attributes. Raises UserError for one that the parser cannot read."""
        return list(self._remembered(prompt))

    def _read(self, prompt: str) -> tuple[Entity, ...]:
        prompt = prompt[:LONGEST]
        if not prompt.strip():
            return ()
        words = self.parser.parse(prompt)
        ids, spans = self._tokens(prompt)
        if self.official:
            tokens = self.tokenizer.convert_ids_to_tokens(ids)
            pieces = {i: piece.replace("</w>", "") for i, piece in enumerate(tokens[1:-1], 1)}
            found = official_entities(words, pieces)
            last = min(len(ids), self.limit) - 1
            return tuple(entity for entity in found if max(entity.positions) < last)
        return tuple(entities_of(words, prompt, spans))

    def _tokens(self, prompt: str) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """Token ids of the whole prompt, and the characters [start, end) of each position that is read."""
        read = self.tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
        last = min(len(read["input_ids"]), self.limit) - 1
        return read["input_ids"], dict(enumerate(read["offset_mapping"][1:last], 1))

    def shown(self, prompt: str) -> list[Entity]:
        """What there is to be seen of a prompt: every noun with attributes, also where no detector is asked
        for it; without any, each noun, adjective and verb by itself (then no entity has two words).

        Raises UserError for a prompt that the parser cannot read.
        """
        prompt = prompt[:LONGEST]
        words = self.parser.parse(prompt) if prompt.strip() else []
        single = [[i] for i, word in enumerate(words) if word.pos in CONTENT]
        spans = self._tokens(prompt)[1]
        return grouped(attributed(words), words, prompt, spans) or grouped(single, words, prompt, spans)


def entities_of(words: Sequence[Word], prompt: str, spans: Mapping[int, tuple[int, int]]) -> list[Entity]:
    """The entities of a parsed prompt. spans: for each token position the characters [start, end) it covers;
    a word of which no part is covered is left out.
    """
    return detectable(grouped(attributed(words), words, prompt, spans))


def grouped(
    groups: Iterable[Sequence[int]],
    words: Sequence[Word],
    prompt: str,
    spans: Mapping[int, tuple[int, int]],
) -> list[Entity]:
    """Groups of words, the noun last, as entities. spans: see `entities_of`."""
    places = []
    for word, start in zip(words, _starts(prompt, words), strict=True):
        end = start + len(word.text) if start >= 0 else start
        places.append([p for p, (a, b) in spans.items() if a < end and b > start])
    found = []
    for group in groups:
        if places[group[-1]]:
            seen = [i for i in group if places[i]]
            positions = tuple(dict.fromkeys(p for i in seen for p in places[i]))
            texts = tuple(words[i].text for i in seen)
            found.append(Entity(texts[-1].lower(), positions, texts))
    return found


def official_entities(words: Sequence[Word], pieces: Mapping[int, str]) -> list[Entity]:
    """The entities of a parsed prompt as the official code finds them. pieces: `located`."""
    groups = kept(unified(by_modifier(words) + by_copula(words) + by_relative_clause(words)))
    found = located([[words[i].text for i in group] for group in groups], pieces)
    return detectable(official_entity(group, pieces) for group in found if group)


def official_entity(group: Sequence[Place], pieces: Mapping[int, str]) -> Entity:
    """A group of places as an entity: the last place is the noun, whatever it is."""
    flat = [place if isinstance(place, list) else [place] for place in group]
    texts = tuple("".join(pieces[p] for p in place) for place in flat)
    return Entity(texts[-1], tuple(p for place in flat for p in place), texts)


def detectable(entities: Iterable[Entity]) -> list[Entity]:
    """Without all entities whose noun occurs more than once, and without those on STOP_LIST."""
    listed = list(entities)
    counts = Counter(entity.noun for entity in listed)
    return [e for e in listed if counts[e.noun] == 1 and not {e.noun, e.noun[:-1]} & STOP_LIST]


def located(groups: Iterable[Sequence[str]], pieces: Mapping[int, str]) -> list[list[Place]]:
    """Where the words of each group stand, as the official code finds them: from the start of the prompt, the
    first place that neither this group nor one before it has. Words that are not found are left out.

    pieces: the text of each token but begin and end, by position, as the tokenizer has it (lower case).
    """
    used: set[int] = set()
    found = []
    for group in groups:
        places: list[Place] = []
        for word in group:
            for at, piece in pieces.items():
                if piece == word:
                    if at not in places and at not in used:
                        places.append(at)
                        break
                elif word.startswith(piece):
                    several = _pieces_of(word, at, pieces)
                    if several and several not in places and not used & set(several):
                        places.append(several)
                        break
        used |= {p for place in places for p in (place if isinstance(place, list) else [place])}
        found.append(places)
    return found


def describe(prompt: str, entities: Sequence[Entity]) -> str:
    """One line for messages: `'a red dog and a cat': dog (red dog)`."""
    listed = ", ".join(f"{entity.noun} ({' '.join(entity.words)})" for entity in entities)
    return f"{prompt!r}: {listed or 'no noun with an attribute'}"


def _starts(prompt: str, words: Sequence[Word]) -> list[int]:
    """Where each word begins: as the parser says, else looked for behind the word before; -1 if not there."""
    starts, at = [], 0
    for word in words:
        start = word.start if word.start >= 0 else prompt.find(word.text, at)
        starts.append(start)
        at = max(at, start + len(word.text)) if start >= 0 else at
    return starts


def _pieces_of(word: str, at: int, pieces: Mapping[int, str]) -> list[int]:
    """Positions from `at` on whose pieces make up the word; empty if they do not."""
    joined, places = pieces[at], [at]
    while joined != word:
        following = pieces.get(places[-1] + 1)
        if following is None or following == word or not word.startswith(joined + following):
            return []
        joined += following
        places.append(places[-1] + 1)
    return places
