"""Prompts parsed by spaCy. The one module that imports it."""

from __future__ import annotations

import spacy

from align_cli.errors import UserError, first_line
from align_cli.grounding.parsing import INSTALL, Word

BEST_FIRST = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""The official code takes the first."""
UNUSED = ("ner", "lemmatizer", "textcat")


def installed() -> list[str]:
    """The English models that are installed, best first."""
    names = sorted(name for name in spacy.util.get_installed_models() if name.startswith("en_"))
    return sorted(names, key=lambda name: BEST_FIRST.index(name) if name in BEST_FIRST else len(BEST_FIRST))


class SpacyParser:
    """An installed spaCy model, or one in a folder.

    model: its name or folder; "" for the best English one.

    Raises:
        UserError: there is no such model, it cannot be read, or it has no parser.
    """

    def __init__(self, model: str = "") -> None:
        found = installed()
        if not model and not found:
            raise UserError(f"spaCy is installed, but no English model of it; {INSTALL}")
        model = model or found[0]
        self.name = f"spacy:{model}"
        try:
            self._model = spacy.load(model, exclude=UNUSED)
        except OSError as error:
            there = f"English ones installed: {', '.join(found) or 'none'}"
            raise UserError(
                f"the spaCy model {model!r} cannot be read ({first_line(error)}); {there}; {INSTALL}"
            ) from error
        except (ImportError, ValueError) as error:  # it needs another package, or another version of spaCy
            raise UserError(f"the spaCy model {model!r} cannot be loaded: {first_line(error)}") from error
        seen = self._model("a red dog")
        if not (seen.has_annotation("DEP") and seen.has_annotation("TAG")):
            parts = ", ".join(self._model.pipe_names) or "nothing"
            raise UserError(f"the spaCy model {model!r} has no parser and tagger (it has {parts}); {INSTALL}")

    def parse(self, prompt: str) -> list[Word]:
        return [Word(t.text, t.pos_, t.dep_, t.head.i, t.idx) for t in self._model(prompt)]
