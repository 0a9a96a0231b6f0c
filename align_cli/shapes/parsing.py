"""Parser of the captions of the shapes world: their nouns, and the adjective before each. No torch."""

from __future__ import annotations

import re
from textwrap import shorten

from align_cli.errors import UserError
from align_cli.grounding.parsing import Word
from align_cli.shapes.captions import parse
from align_cli.shapes.world import BACKGROUNDS, COLORS, SHAPES

_NOUNS = frozenset(SHAPES) | {f"{shape}s" for shape in SHAPES} | {"background", "picture", "objects", "total"}
_ADJECTIVES = frozenset(COLORS) | frozenset(BACKGROUNDS) | {"whole"}
_WORD = re.compile(r"\w+|[^\w\s]")


class ShapesParser:
    """Reads every kind of caption of the grammar (`shapes.captions`); any other text is refused.

    Relations are those between an adjective and the noun that follows it; every other word is its own root,
    of part of speech "X".
    """

    name = "shapes"

    def parse(self, prompt: str) -> list[Word]:
        """Raises UserError for a prompt outside the grammar."""
        try:
            parse(prompt)
        except UserError as error:
            raise UserError(
                f"the parser 'shapes' cannot read {shorten(prompt, 80)!r}, which is no caption of the shapes "
                "world; for other prompts name another parser (auto, plain, spacy)"
            ) from error
        found = [(match.group(), match.start()) for match in _WORD.finditer(prompt)]
        following = [text.lower() for text, _ in found[1:]] + [""]
        words = []
        for i, (text, start) in enumerate(found):
            if text.lower() in _NOUNS:
                words.append(Word(text, "NOUN", "ROOT", i, start))
            elif text.lower() in _ADJECTIVES and following[i] in _NOUNS:
                words.append(Word(text, "ADJ", "amod", i + 1, start))
            else:
                words.append(Word(text, "X", "ROOT", i, start))
        return words
