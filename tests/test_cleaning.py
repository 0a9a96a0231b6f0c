"""Texts as OpenAI's and open_clip's tokenizers see them."""

from __future__ import annotations

from html import unescape

import pytest

from align_cli.rewards.cleaning import clean

CASES = {
    "plain text, it's fine.": "plain text, it's fine.",
    "the word \u2018openai\u2019": "the word 'openai'",
    "\u201cHello\u201d \u02bcn\u02bc": "\"Hello\" 'n'",
    "\ufb01re \ufb02y \u0132ssel": "fire fly IJssel",
    "\uff21\uff22\u3000\uff01": "AB !",
    "cafe\u0301": "caf\u00e9",
    "bread &amp; butter &lt;3": "bread & butter <3",
    "&amp;amp;": "&",
    "a\x1b[31mred\x1b[0m dog\ufeff": "ared dog",
    "it\x92s \x93fine\x94 \x96 \x8d": 'it\'s "fine" \u2013 \x8d',
    "one\r\ntwo\u2028three": "one\ntwo\nthree",
    "  blanks \t inside  ": "blanks \t inside",
    "\u2026 \u2014 \u00bd \u5c71 \U0001f600": "\u2026 \u2014 \u00bd \u5c71 \U0001f600",
    "": "",
}


@pytest.mark.parametrize("text", CASES)
def test_clean(text):
    assert clean(text) == CASES[text]


@pytest.mark.hpsv2
@pytest.mark.parametrize(
    "text", [*CASES, "&rsquo;s", "a <b> &rsquo; c", "\uff9e\uffe5\u01c4", "tab\tand\x0bmore"]
)
def test_as_ftfy_does_it(text):
    import ftfy

    assert clean(text) == unescape(unescape(ftfy.fix_text(text))).strip()


@pytest.mark.hpsv2
def test_every_character_as_ftfy_does_it():
    import ftfy

    for code in (*range(1, 0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x1FB00)):
        text = f"a{chr(code)}b"
        assert clean(text) == unescape(unescape(ftfy.fix_text(text))).strip(), hex(code)
