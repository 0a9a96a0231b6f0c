"""How captions fall into sentences; the official way is also compared with golden numbers."""

from __future__ import annotations

import time

import pytest

from align_cli.sentences import SPLITTERS, drop_captions, split_better, split_sentences, starts


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", [""]),
        (" ", [" ."]),
        ("a cat", ["a cat."]),
        ("A cat. It runs.", ["A cat.", " It runs."]),
        ("A cat. ", ["A cat.", " ."]),
        ("...", ["..."]),
        ("3.5 m", ["3.", "5 m."]),
        ("Hello!", ["Hello!."]),
        ('He said "Hi"! So; "a;" b', ['He said "Hi.', ' So; "a.', " b."]),
    ],
)
def test_official_segments(text, segments):
    assert split_sentences(text) == segments


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", [""]),
        (" \n ", [""]),
        ("a cat", ["a cat"]),
        ("A cat. It runs! Where? There; far", ["A cat.", "It runs!", "Where?", "There;", "far"]),
        ("a cat. a dog ", ["a cat.", "a dog"]),
        ("One line\nanother\r\n\r\nand one", ["One line", "another", "and one"]),
        ("para one.Two goes on.A dog", ["para one.", "Two goes on.", "A dog"]),
        ("It is 3.5 m tall. It costs $4.99.", ["It is 3.5 m tall.", "It costs $4.99."]),
        ("Dr. Smith met Mr. X at 5 p.m. in St. Louis.", ["Dr. Smith met Mr. X at 5 p.m. in St. Louis."]),
        ("e.g. a fox, i.e. a small red one. End", ["e.g. a fox, i.e. a small red one.", "End"]),
        ("The U.S.A. flag. In the U.S. He runs.", ["The U.S.A. flag.", "In the U.S.", "He runs."]),
        ("J. K. Rowling etc. writes etc. The end", ["J. K. Rowling etc. writes etc.", "The end"]),
        ("Fig. 3 and No. 5 are red. No. It is.", ["Fig. 3 and No. 5 are red.", "No.", "It is."]),
        ("See www.foo.com/b?c=1. Then img_1.png; ok", ["See www.foo.com/b?c=1.", "Then img_1.png;", "ok"]),
        ("Mail a.b@c.de. Or not", ["Mail a.b@c.de.", "Or not"]),
        ("Wait... what? Wait... What\u2026 yes", ["Wait... what?", "Wait...", "What\u2026 yes"]),
        ('"Go." he said. "Stop!" Then', ['"Go." he said.', '"Stop!"', "Then"]),
        ("\u4e00\u732b\u3002\u4e24\u72d7\uff01ok", ["\u4e00\u732b\u3002", "\u4e24\u72d7\uff01", "ok"]),
        ("...", ["..."]),
        ("?!", ["?!"]),
        ("\U0001f431. \U0001f436!", ["\U0001f431.", "\U0001f436!"]),
    ],
)  # fmt: skip
def test_better_sentences(text, sentences):
    assert split_better(text) == sentences


@pytest.mark.parametrize("name", SPLITTERS)
def test_no_text_gives_nothing_and_long_ones_take_no_time(name):
    split = SPLITTERS[name]
    began = time.perf_counter()
    for text in (
        "word " * 5000,
        "a." * 5000,
        "A. b c." * 2000,
        " " * 9000,
        "..." * 3000,
        "@." * 3000,
        "http://" * 900,
    ):
        parts = split(text)
        assert parts and all(isinstance(part, str) for part in parts)
    assert len(split("word " * 5000)) == 1
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("name", SPLITTERS)
def test_where_sentences_begin(name):
    text = 'A cat. "A cat"! It is 3 m; yes? The end'
    parts = SPLITTERS[name](text)
    for part, begin in zip(parts, starts(text, parts), strict=True):
        assert text[begin:].startswith(part[:-1])
    assert starts(text, parts) == sorted(set(starts(text, parts)))


def test_dropped_captions():
    draws = iter([0.05, 0.1, 0.9])
    assert drop_captions(["a", "b", "c"], 0.1, lambda: next(draws)) == ["", "b", "c"]
