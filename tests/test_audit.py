"""The token audit: what tokenizers cut, per text encoder of every family."""

from __future__ import annotations

from typing import Any

import pytest

from align_cli.cuts import Cut, cuts
from align_cli.evaluation.audit import audit, audit_words, by_arm
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.models.frozen import token_ids

LONG = "a red circle left of a blue square on a white background "


def prompt_set(*texts: str) -> PromptSet:
    return PromptSet("x", "x", tuple(PromptRow(f"p{i}", text) for i, text in enumerate(texts)))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_what_is_not_lost_is_what_the_encoders_read(tiny_models: dict[str, Any], family: str):
    """The kept words alone give the encoder's tokens up to the cut, and one word more no longer fits."""
    model = tiny_models[family]
    prompts = ["a red circle", LONG * 40, (LONG * 40).strip() + ". The end"]
    found = model.audit_text(prompts)
    assert list(found) == ["text_encoder", "text_encoder_2", "text_encoder_3"][: len(model.encoders)]
    tokenizers = [model.tokenizer] if family == "sd15" else [*model.tokenizers]
    tokenizers += [model.t5_tokenizer] if family == "sd3" else []
    for tokenizer, own in zip(tokenizers, found.values(), strict=True):
        assert own[0].lost == "" and own[0].tokens <= own[0].limit
        for prompt, cut in zip(prompts[1:], own[1:], strict=True):
            assert cut.tokens > cut.limit and cut.lost and prompt.strip().endswith(cut.lost)
            kept = prompt.strip().removesuffix(cut.lost).strip()
            whole = token_ids(tokenizer, [prompt], cut.limit)["input_ids"][0].tolist()
            ids = tokenizer(kept)["input_ids"][:-1]  # without the end token
            assert whole[: len(ids)] == ids and len(ids) < cut.limit
            more = f"{kept} {cut.lost.split()[0]}"
            assert len(tokenizer(more)["input_ids"]) > cut.limit


class Letters:
    """A tokenizer with a token per character, and one for the start and the end."""

    def __call__(self, text: str, *, truncation: bool = False, max_length: int = 0, **_: object) -> dict:
        spans = [(i, i + 1) for i in range(len(text))]
        if truncation:
            spans = spans[: max_length - 2]
        spans = [(0, 0), *spans, (0, 0)]
        return {"input_ids": [0] * len(spans), "offset_mapping": spans}


def test_half_a_word_is_a_lost_word():
    prompts = [
        "a red",
        "a red cir",
        "a red circle",
        "aredcircle",
        "\u5706\u5f62\u65b9\u5f62\u7ea2\u8272\u84dd\u8272",
        "one,two,three",
    ]
    assert cuts(Letters(), 9, prompts) == [
        Cut(9, 7, ""),
        Cut(9, 11, "cir"),
        Cut(9, 14, "circle"),
        Cut(9, 12, "aredcircle"),
        Cut(9, 10, "\u8272"),  # no blanks between words: as far as it is read
        Cut(9, 15, ",three"),
    ]


def test_what_stands_before_a_prompt_counts_but_is_not_lost():
    assert cuts(Letters(), 9, ["red", "a red"], before="a ") == [Cut(9, 7, ""), Cut(9, 9, "")]
    assert cuts(Letters(), 9, ["red circle"], before="a ") == [Cut(9, 14, "circle")]
    assert cuts(Letters(), 9, ["red"], before="a very long beginning ") == [Cut(9, 27, "red")]


def test_audit_counts_and_shows_the_worst():
    prompts = prompt_set(*("x" * n for n in (3, 20, 30, 12)))
    readers = {"text_encoder": cuts(Letters(), 10, prompts.texts), "shapes": [Cut(0, 0, "")] * 4}
    found = audit(prompts, readers, "text encoder")
    assert [(e["name"], e["limit"], e["cut"], e["of"], e["share"]) for e in found] == [
        ("text_encoder", 10, 3, 4, 0.75),
        ("shapes", 0, 0, 4, 0.0),
    ]
    examples = found[0]["examples"]
    assert isinstance(examples, list) and [e["id"] for e in examples] == ["p2", "p1", "p3"]
    assert examples[0]["lost"] == "x" * 30
    assert audit_words(found) == ["text encoder text_encoder reads 10 tokens and cuts 3 of 4 prompts"]
    with pytest.raises(ValueError, match="4 prompts but 1 cuts"):
        audit(prompts, {"x": [Cut(1, 1, "")]}, "scorer")


def test_arms_that_read_in_different_ways_are_named():
    prompts = prompt_set(*("x" * n for n in (3, 20, 30, 12)))
    short, long = (audit(prompts, {"e": cuts(Letters(), n, prompts.texts)}, "reader") for n in (10, 25))
    assert by_arm({"base": short, "aligned": short}) == short and short[0]["arms"] == []
    found = by_arm({"base": short, "aligned": long, "half": short})
    assert [(e["arms"], e["cut"]) for e in found] == [(["base", "half"], 3), (["aligned"], 1)]
    assert audit_words(found) == [
        "base, half: reader e reads 10 tokens and cuts 3 of 4 prompts",
        "aligned: reader e reads 25 tokens and cuts 1 of 4 prompts",
    ]
