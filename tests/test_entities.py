"""Entities of prompts: what goes together, where it stands, what is left out; the official quirks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from align_cli import registry
from align_cli.grounding.entities import Entity, EntityReader, describe, entities_of, official_entities
from align_cli.grounding.groups import attributed, by_relative_clause
from align_cli.grounding.parsing import Word
from align_cli.grounding.plain_parsing import PlainParser
from align_cli.shapes.parsing import ShapesParser

CASE = Path(__file__).parent / "golden" / "comat" / "entity_extraction" / "case.json"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(registry.WEIGHTS / "tiny-sd15" / "tokenizer")


@pytest.fixture(scope="module")
def parses() -> dict[str, list[Word]]:
    """Parses of a real parser, without character offsets."""
    rows = json.loads(CASE.read_text())["rows"]
    return {
        row["prompt"]: [Word(t["text"], t["pos"], t["dep"], t["head"]) for t in row["spacy_tokens"]]
        for row in rows
    }


class Given:
    """Parses that are there already; counts how often it is asked."""

    name = "given"

    def __init__(self, parses: dict[str, list[Word]]) -> None:
        self.parses, self.asked = parses, 0

    def parse(self, prompt: str) -> list[Word]:
        self.asked += 1
        return self.parses[prompt]


def found(words: list[Word], prompt: str) -> list[tuple[str, tuple[str, ...]]]:
    """Nouns and words, each character of the prompt being a token of its own."""
    spans = {i + 1: (i, i + 1) for i in range(len(prompt))}
    return [(e.noun, e.words) for e in entities_of(words, prompt, spans)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red dog and a pink cat", [("dog", ("red", "dog")), ("cat", ("pink", "cat"))]),
        ("the dog is red", [("dog", ("red", "dog"))]),
        ("the old lady is happy", [("lady", ("old", "happy", "lady"))]),
        (
            "the apples are green and the bananas are yellow",
            [("apples", ("green", "apples")), ("bananas", ("yellow", "bananas"))],
        ),
        (
            "A Golden Retriever plays with a blue ball",
            [("retriever", ("Golden", "Retriever")), ("ball", ("blue", "ball"))],
        ),
        ("Yellow flowers", [("flowers", ("Yellow", "flowers"))]),
        ("the man wears a hat that is black", [("hat", ("black", "hat"))]),
        ("a blue cat sitting on a red chair next to a blue chair", [("cat", ("blue", "cat"))]),
        ("what a beautiful day", []),
        ("dogs and cats", []),
        ("a red red red bear", []),
    ],
)
def test_entities(parses, prompt, expected):
    assert found(parses[prompt], prompt) == expected


def test_official_quirks(parses):
    def official(prompt: str, pieces: str) -> list[Entity]:
        return official_entities(parses[prompt], dict(enumerate(pieces.split(), 1)))

    assert official("the dog is red", "the dog is red") == [Entity("red", (2, 4), ("dog", "red"))]
    assert official("Yellow flowers", "yellow flowers") == [Entity("flowers", (2,), ("flowers",))]
    hat = "the man wears a hat that is black"
    assert official(hat, hat) == []
    assert by_relative_clause(parses[hat]) == []
    assert by_relative_clause(parses[hat], every=True) == [[7, 4]]


def test_one_noun_said_in_several_ways_is_one_entity():
    """the dog that is red is big: a relative clause and a copula, neither inside the other"""
    words = [
        Word("the", "DET", "det", 1),
        Word("dog", "NOUN", "nsubj", 5),
        Word("that", "PRON", "nsubj", 3),
        Word("is", "AUX", "relcl", 1),
        Word("red", "ADJ", "acomp", 3),
        Word("is", "AUX", "ROOT", 5),
        Word("big", "ADJ", "acomp", 5),
    ]
    assert attributed(words) == [[4, 6, 1]]
    assert found(words, "the dog that is red is big") == [("dog", ("red", "big", "dog"))]


def test_equal_words_have_their_own_positions(tokenizer):
    reader = EntityReader(PlainParser(), tokenizer, limit=32)
    assert reader.entities("a blue circle and a blue square") == [
        Entity("circle", (2, 3), ("blue", "circle")),
        Entity("square", (6, 7), ("blue", "square")),
    ]


def test_a_word_in_pieces_has_all_their_positions(tokenizer, parses):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a fluffy rabbit").input_ids)
    a, end = pieces.index("a</w>"), len(pieces) - 1
    for parser in (PlainParser(), Given(parses)):
        (entity,) = EntityReader(parser, tokenizer, limit=32).entities("a fluffy rabbit")
        assert entity.positions == tuple(range(a + 1, end))
        (official,) = EntityReader(parser, tokenizer, limit=32, official=True).entities("a fluffy rabbit")
        assert official == entity


def test_offsets_and_order_agree(tokenizer):
    """Words without offsets are looked for in their order."""
    prompt = "  A RED circle,\n\ta red Caf\u00e9  and the white square "
    words = PlainParser().parse(prompt)
    reader = EntityReader(Given({prompt: words}), tokenizer, limit=32)
    blind = [Word(w.text, w.pos, w.dep, w.head) for w in words]
    assert reader.entities(prompt) == EntityReader(Given({prompt: blind}), tokenizer, limit=32).entities(
        prompt
    )
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    circle, cafe, square = reader.entities(prompt)
    assert [pieces[p] for p in circle.positions] == ["red</w>", "circle</w>"]
    assert cafe.noun == "caf\u00e9"
    assert pieces[cafe.positions[0]] == "red</w>"
    assert [pieces[p] for p in square.positions] == ["white</w>", "square</w>"]


def test_what_is_not_read_is_left_out(tokenizer):
    prompt = "a red circle and a blue square"  # 7 words: square at 7, the end token at 8

    def nouns(limit: int, text: str = prompt, **settings: bool) -> list[str]:
        reader = EntityReader(PlainParser(), tokenizer, limit=limit, **settings)
        assert all(p < limit - 1 for e in reader.entities(text) for p in e.positions)
        return [e.noun for e in reader.entities(text)]

    for official in (False, True):
        assert nouns(9, official=official) == ["circle", "square"]
        assert nouns(8, official=official) == ["circle"]
        assert nouns(2, official=official) == []
    for limit, words in ((7, ("red", "blue", "circle")), (6, ("red", "circle"))):
        (entity,) = EntityReader(PlainParser(), tokenizer, limit=limit).entities("the red circle is blue")
        assert entity.words == words
    # a second circle that is not read does not count as one
    assert nouns(6, "a red circle and a blue circle") == ["circle"]
    assert nouns(9, "a red circle and a blue circle") == []


def test_a_prompt_is_parsed_once(tokenizer, parses):
    parser = Given(parses)
    reader = EntityReader(parser, tokenizer, limit=32)
    first = reader.entities("the dog is red")
    first.clear()
    assert [e.noun for e in reader.entities("the dog is red")] == ["dog"]
    assert parser.asked == 1


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    "prompt", ["", " \n\t", "\u2603 \U0001f389", "...", "'s", "<|endoftext|>", "\u5c0f\u732b", "\u200b", "a"]
)
def test_nothing_to_find(tokenizer, prompt, official):
    assert EntityReader(PlainParser(), tokenizer, limit=32, official=official).entities(prompt) == []


@pytest.mark.parametrize("official", [False, True])
def test_very_long_prompts(tokenizer, official):
    reader = EntityReader(PlainParser(), tokenizer, limit=32, official=official)
    assert [e.noun for e in reader.entities("a red circle " + "and so on " * 20_000)] == ["circle"]
    assert [e.noun for e in reader.entities("a red circle" + " " * 100_000 + "and a blue square")] == [
        "circle"
    ]
    assert reader.entities("x" * 100_000) == []


def test_the_empty_prompt_asks_no_parser(tokenizer):
    assert EntityReader(ShapesParser(), tokenizer, limit=32).entities("  ") == []


def test_describe(tokenizer):
    reader = EntityReader(PlainParser(), tokenizer, limit=32)
    prompt = "a Red circle and a square"
    assert describe(prompt, reader.entities(prompt)) == "'a Red circle and a square': circle (Red circle)"
    assert describe("a square", []) == "'a square': no noun with an attribute"
