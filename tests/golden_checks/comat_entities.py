"""CoMat: the attributed nouns of a prompt, and where their words stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cli.grounding import groups
from align_cli.grounding.entities import STOP_LIST, located, official_entities, official_entity
from align_cli.grounding.parsing import Word
from golden_checks.lines import Kind, Line, same


def stages(row: dict[str, Any]) -> dict[str, object]:
    """Every stage of a row from its parse and its pieces alone, by the names of the case."""
    words = [Word(t["text"], t["pos"], t["dep"], t["head"]) for t in row["spacy_tokens"]]
    pieces = {int(position): piece for position, piece in row["clip_wordpieces"].items()}
    three = {
        "by_modifier": groups.by_modifier(words),
        "by_copula": groups.by_copula(words),
        "by_relative_clause": groups.by_relative_clause(words),
    }
    unified = groups.unified([group for found in three.values() for group in found])
    kept = groups.kept(unified)
    texts = [[words[i].text for i in group] for group in kept]
    places = located(texts, pieces)
    before = [official_entity(group, pieces) for group in places if group]
    found = official_entities(words, pieces)
    return {
        **three,
        "unified": unified,
        "kept": kept,
        "kept_words": texts,
        "groups": places,
        "nouns_before_filter": [entity.noun for entity in before],
        "token_positions_before_filter": [list(entity.positions) for entity in before],
        "nouns": [entity.noun for entity in found],
        "token_positions": [list(entity.positions) for entity in found],
    }


def entity_extraction(_: Path, case: dict[str, Any]) -> Iterator[Line]:
    """The stop list, and every stage of every prompt."""
    yield same("stop_list", sorted(STOP_LIST), sorted(case["stop_list"]))
    for i, row in enumerate(case["rows"]):
        for name, got in stages(row).items():
            yield same(f"{i}.{name}", got, row[name])


KINDS = [Kind("comat", lambda _, case: "stop_list" in case, entity_extraction)]
