"""Prompts read sentence by sentence: what the denoiser is told, what is cut, gradients, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import load
from softrepa_helpers import a_batch, make, run

from align_cli.errors import UserError
from align_cli.models.conditioning import StepText
from align_cli.models.segments import SegmentReader
from align_cli.models.sources import find
from align_cli.sampling import sample
from align_cli.sentences import SPLITTERS
from align_cli.settings import ModelSettings, SampleSettings

LONG = (
    "A large red circle is left of a small blue square. A green triangle is above the red circle. "
    "The background is white. There are two yellow stars in the corner. The star is below the triangle!"
)
BAD = {
    "empty": "",
    "blanks": "  \n ",
    "one sentence": "red circle " * 2500,
    "punctuation": "...!?;;; \"' --",
    "emoji": "\U0001f431 \U0001f436\u200d\U0001f9ba. \U0001f600!",
    "many sentences": "A cat. " * 2000,
}


def sd15(tiny_models):
    return copy.deepcopy(tiny_models["sd15"])


def by_hand(model, text: str, length: int) -> torch.Tensor:
    """Every sentence alone, without padding and without its end token; then the mean of the empty text."""
    rows, fillers = [], []
    words = model.towers()[0].tokenizer
    for tower in model.towers():
        own = []
        for sentence in SPLITTERS["official"](text):
            ids = words(sentence, truncation=True, max_length=tower.limit)["input_ids"]
            own.append(tower.states(torch.tensor([ids]))[0, :-1])
        rows.append(torch.cat(own)[:length])
        empty = tower.tokenizer("", padding="max_length", max_length=tower.limit)["input_ids"]
        states = tower.states(torch.tensor([empty]))[0]
        fillers.append(states[tower.limit // 2 :].mean(0))
    found = torch.cat(rows, dim=-1)
    return torch.cat([found, torch.cat(fillers).expand(length - len(found), -1)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("length", [100, 40, 3])
@torch.no_grad()
def test_reading_by_hand(tiny_models, family, length):
    model, texts = tiny_models[family], [LONG, "a red circle", ""]
    plain = model.encode_text(texts)
    with model.reading(SegmentReader(model, length=length)):
        assert model.token_limit == length
        found = model.encode_text(texts)
        assert found.tokens.shape == (3, length, plain.tokens.shape[-1])
        for row, text in zip(found.tokens, texts, strict=True):
            torch.testing.assert_close(row, by_hand(model, text, length), rtol=1e-5, atol=1e-6)
        if family == "sdxl":
            torch.testing.assert_close(found.pooled, plain.pooled)
        empty = model.uncond(2)
        assert empty.tokens.shape == (2, length, plain.tokens.shape[-1])
        if family == "sdxl":
            assert not empty.tokens.any() and not empty.pooled.any() and len(empty.pooled) == 2
        else:
            torch.testing.assert_close(empty.tokens[1], found.tokens[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.encode_text(texts).tokens, plain.tokens)


def test_without_a_reader_nothing_changes(tiny_models):
    for model in tiny_models.values():
        assert model.reader is None
        assert torch.equal(model.encode_text([LONG]).tokens, model.plain_text([LONG]).tokens)
        assert torch.equal(model.uncond(2).tokens, model.plain_uncond(2).tokens)
        assert model.audit_text([LONG]) == model.plain_audit([LONG])


def test_the_mark_of_padding_shifts_no_tower(tiny_models):
    """SDXL's second tokenizer takes every "!" for padding: both towers read the tokens of the first."""
    model = tiny_models["sdxl"]
    first, second = model.tokenizers
    assert second.pad_token == "!" and first("wow!!").input_ids != second("wow!!").input_ids
    reader = SegmentReader(model, length=30)
    found = reader.encode(["a red!! circle. a blue square"]).tokens[0]
    torch.testing.assert_close(found, by_hand(model, "a red!! circle. a blue square", 30))


def test_where_padding_is_a_mark_that_mark_goes(tiny_models):
    """SD2.x, of whose tokens "!" inside a word has the id of the padding."""
    model = sd15(tiny_models)
    model.tokenizer.pad_token_id = model.tokenizer.convert_tokens_to_ids("!")
    ids = model.tokenizer("wow!!.").input_ids
    kept = [i for i, token in enumerate(ids[:-1]) if token != model.tokenizer.pad_token_id]
    assert len(kept) == len(ids) - 3
    reader = SegmentReader(model, length=20)
    found = reader.encode(["wow!!"]).tokens[0]
    states = model.towers()[0].states(torch.tensor([ids]))[0]
    torch.testing.assert_close(found[: len(kept)], states[kept], rtol=1e-5, atol=1e-6)
    assert reader.count("wow!!") == len(kept)


def test_towers_with_other_words_are_refused(tiny_models):
    model = copy.deepcopy(tiny_models["sdxl"])
    model.tokenizers[1].add_tokens(["circle of fire"])
    with pytest.raises(UserError, match="different vocabularies; give --text plain"):
        SegmentReader(model, length=20)


def test_more_rows_stand_below(tiny_models):
    model = tiny_models["sd15"]
    rows = torch.randn(2, 5, model.text_width)
    plain = SegmentReader(model, length=30)
    reader = SegmentReader(model, length=30, more=lambda texts: rows[: len(texts)])
    found = reader.encode([LONG, "a"]).tokens
    assert torch.equal(found[:, 30:], rows) and torch.equal(found[:, :30], plain.encode([LONG, "a"]).tokens)
    assert reader.uncond(3).tokens.shape == (3, 35, model.text_width)
    assert "more rows" in reader.words() and reader.words() != plain.words()


def test_the_filler_follows_the_encoder(tiny_models):
    """There it is made once per process, and outlives its encoder."""
    model = sd15(tiny_models)
    model.reader = SegmentReader(model, length=20)
    before = model.encode_text([""]).tokens[0, -1]
    with torch.no_grad():
        model.text_encoder.get_parameter("final_layer_norm.bias").add_(1)
    torch.testing.assert_close(model.encode_text([""]).tokens[0, -1], before + 1)


def test_gradients_reach_a_trained_encoder(tiny_models):
    model = sd15(tiny_models)
    model.reader = SegmentReader(model, length=60)
    assert not model.encode_text([LONG]).tokens.requires_grad
    model.text_encoder.requires_grad_(True)
    for part in (slice(0, 10), slice(-1, None)):  # words, and the filler
        model.text_encoder.zero_grad()
        model.encode_text([LONG]).tokens[0, part].square().sum().backward()
        assert model.text_encoder.get_parameter("embeddings.token_embedding.weight").grad.abs().max() > 0


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bad_input(tiny_models, family, splitter, kind):
    model, text = tiny_models[family], BAD[kind]
    reader = SegmentReader(model, length=50, splitter=splitter)
    found = reader.encode([text, "a red circle"]).tokens
    assert found.shape[1] == 50 and torch.isfinite(found).all()
    torch.testing.assert_close(found[1], reader.encode(["a red circle"]).tokens[0], rtol=1e-5, atol=1e-6)
    for (cut,) in reader.audit([text]).values():
        if kind in ("one sentence", "many sentences"):
            assert text.strip().endswith(cut.lost) and cut.tokens > 2000
        else:
            assert cut.lost == "" and 1 <= cut.tokens <= 50


def test_what_is_cut(tiny_models):
    model = tiny_models["sd15"]
    text = "A red circle. " + "red " * 40 + "blue circle? The star."
    reader = SegmentReader(model, length=240)
    (cut,) = reader.audit([text])["text_encoder"]
    assert cut.limit == 240 and cut.lost == "red " * 10 + "blue circle?"  # 30 words fit between begin and end
    sentences = SPLITTERS["official"](text)
    tokens = [len(model.tokenizer(sentence).input_ids) - 1 for sentence in sentences]  # without the end
    assert cut.tokens == sum(tokens) == reader.count(text)
    (short,) = SegmentReader(model, length=36).audit([text])["text_encoder"]
    assert short.lost == "red " * 10 + "blue circle? ... The star."
    (short,) = SegmentReader(model, length=38).audit([text])["text_encoder"]
    assert short.lost == "red " * 10 + "blue circle? ... star."
    assert model.plain_audit([LONG])["text_encoder"][0].lost
    assert not reader.audit([LONG])["text_encoder"][0].lost


def test_sentences_beyond_the_length_are_not_encoded(tiny_models):
    model = sd15(tiny_models)
    seen = []
    model.text_encoder.register_forward_hook(
        lambda _m, args, _k, _o: seen.append(args[0].shape), with_kwargs=True
    )
    SegmentReader(model, length=20).encode(["A red circle. " * 500, "a blue square."])
    assert seen[0][0] == 4 + 1  # five tokens each


def test_sd3_reads_long_prompts_itself(tiny_sd3_folder):
    with pytest.raises(UserError, match="model.text segments does not apply.*--text plain"):
        load(tiny_sd3_folder, text="segments")


def test_settings(tiny_sd15_folder):
    model = load(tiny_sd15_folder, text="segments", segment_length=33, splitter="sentences")
    assert (model.reader.length, model.reader.splitter) == (33, "sentences")
    for wrong in ({"text": "long"}, {"splitter": "x"}, {"segment_length": 0}):
        with pytest.raises(UserError, match=f"model.{next(iter(wrong))} must be"):
            ModelSettings(**wrong)
    assert "text" not in ModelSettings().facts()
    assert ModelSettings(text="segments").facts()["segment_length"] == 240


def test_pictures_do_not_depend_on_their_neighbours(tiny_models):
    model = sd15(tiny_models)
    settings = SampleSettings(steps=2, guidance=3.0)
    plain = sample(model, [LONG], settings, [1])
    model.reader = SegmentReader(model, length=80)
    both = sample(model, [LONG, "a red circle"], settings, [1, 2])
    torch.testing.assert_close(both[:1], sample(model, [LONG], settings, [1]), atol=1e-5, rtol=1e-5)
    assert (both[:1] - plain).abs().max() > 1e-3


def test_the_end_of_a_long_prompt_is_seen(tiny_models):
    model = sd15(tiny_models)
    other = LONG.replace("below the triangle", "right of the circle")
    assert torch.equal(*(model.encode_text([text]).tokens for text in (LONG, other)))
    model.reader = SegmentReader(model, length=80)
    assert not torch.equal(*(model.encode_text([text]).tokens for text in (LONG, other)))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_softrepa_trains_and_steps_are_read_by_segments(tiny_models, family):
    model = copy.deepcopy(tiny_models[family])
    model.reader = SegmentReader(model, length=50)
    method = make(model)
    _, gradients = run(method, a_batch())[:2]
    assert gradients
    text = StepText(model, [LONG], 3)
    assert text.cond(0).tokens.shape[1] == text.uncond(0).tokens.shape[1] == 50


def test_the_embedded_models_lose_nothing_of_five_sentences():
    from align_cli.shapes.dataset import eval_prompts

    model = load("tiny-sd15", text="segments")
    texts = [p.text for p in eval_prompts(40, kinds=("long",))]
    assert texts and any(cut.lost for cut in model.plain_audit(texts)["text_encoder"])
    assert not any(cut.lost for cut in model.audit_text(texts)["text_encoder"])
    assert find("tiny-sd15").embedded
