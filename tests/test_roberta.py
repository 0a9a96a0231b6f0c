"""RoBERTa for phrases: where it comes from, what it reads, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import serve
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel, RobertaTokenizerFast

from align_cli.errors import UserError
from align_cli.models.roberta import PhraseReader, load_roberta

CPU = {"device": "cpu", "dtype": torch.float32}
WORDS = Path(__file__).parent / "golden" / "dpt" / "tokenizer"
PHRASES = ["the left cat on the red sofa", "small dog", ""]
HOW = "get it with 'hf download FacebookAI/roberta-base'.*--set dpt.phrase_encoder="


def config(**other: int) -> RobertaConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return RobertaConfig(**{"vocab_size": 310, "max_position_embeddings": 30, **sizes, **other})


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory) -> Path:
    """A random RoBERTa with the head that it is trained with, as roberta-base is published."""
    folder = tmp_path_factory.mktemp("roberta") / "roberta"
    torch.manual_seed(0)
    RobertaForMaskedLM(config()).save_pretrained(folder)
    RobertaTokenizerFast.from_pretrained(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(roberta_folder) -> PhraseReader:
    return load_roberta(str(roberta_folder), **CPU)


def test_the_encoder_alone_and_frozen(reader, roberta_folder, capfd):
    load_roberta(str(roberta_folder), **CPU)
    assert capfd.readouterr() == ("", "")
    assert reader.encoder.pooler is None and not reader.encoder.training
    assert not any(p.requires_grad for p in reader.encoder.parameters())
    saved = load_file(roberta_folder / "model.safetensors")
    own = reader.encoder.state_dict()
    assert set(own) == {k.removeprefix("roberta.") for k in saved if k.startswith("roberta.")}
    assert all(torch.equal(x, saved[f"roberta.{name}"]) for name, x in own.items())


def test_padding_is_not_read(reader):
    encoding = reader.read(PHRASES)
    ids, mask = encoding["input_ids"], encoding["attention_mask"]
    assert ids.shape == mask.shape and mask[0].all() and mask[2].sum() == 2
    states = reader.states(encoding)
    assert states.shape == (3, ids.shape[1], 16) and reader.width == 16 and not states.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader.states(encoding), states)
    for phrase, row, seen in zip(PHRASES, states, mask, strict=True):
        alone = reader.states(reader.read([phrase]))[0]
        torch.testing.assert_close(row[: seen.sum()], alone, atol=1e-5, rtol=1e-5)


def test_characters_have_tokens(reader):
    encoding = reader.read(PHRASES)
    assert encoding.char_to_token(1, 0) == 1 and encoding.char_to_token(1, 5) is None
    at = encoding.char_to_token(0, 9)
    start, end = encoding.token_to_chars(0, at)
    assert PHRASES[0][start:end] in "cat"


def test_long_phrases_are_cut(reader):
    assert reader.limit == 28  # 30 positions, the first two never used
    encoding = reader.read(["dog " * 40, "dog"])
    assert encoding["input_ids"].shape == (2, 28) and encoding["input_ids"][0, -1] == 2
    assert reader.states(encoding).isfinite().all()
    assert encoding.char_to_token(0, 4 * 39) is None


def test_pooler_and_precision(roberta_folder, tmp_path, reader):
    shutil.copytree(roberta_folder, tmp_path / "r")
    torch.manual_seed(1)
    RobertaModel(config()).save_pretrained(tmp_path / "r")
    half = load_roberta(str(tmp_path / "r"), device="cpu", dtype=torch.bfloat16)
    assert half.states(half.read(PHRASES)).dtype == torch.bfloat16


def test_the_hub_and_its_cache(roberta_folder, tmp_path, monkeypatch, reader):
    shutil.copytree(roberta_folder, tmp_path / "hub" / "org" / "roberta")
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        found = load_roberta("org/roberta", **CPU)
        encoding = found.read(PHRASES)
        assert torch.equal(found.states(encoding), reader.states(encoding))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        load_roberta("org/roberta", **CPU)
        with pytest.raises(UserError, match=HOW) as caught:
            load_roberta("FacebookAI/roberta-base", **CPU)
    assert "cannot be reached" in str(caught.value) and "--model" not in str(caught.value)


def test_no_roberta_says_how_to_get_it(tmp_path, tiny_sd15_folder, roberta_folder):
    def why(source: object) -> str:
        with pytest.raises(UserError, match=HOW) as caught:
            load_roberta(str(source), **CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def lacking(*files: str) -> Path:
        folder = tmp_path / "-".join(files)
        shutil.copytree(roberta_folder, folder)
        for file in files:
            (folder / file).unlink()
        return folder

    assert "there is no such folder" in why("roberta-base")
    assert "does not exist" in why(tmp_path / "none")
    assert "not in this installation" in why("embedded:none")
    assert "no config.json in" in why(tmp_path)
    assert "is no RoBERTa: its model_type is 'clip_text_model'" in why(tiny_sd15_folder)
    assert "no model.safetensors (or .bin)" in why(lacking("model.safetensors"))
    assert "tokenizer.json, or merges.txt and vocab.json is missing" in why(lacking("tokenizer.json"))
    small = lacking("model.safetensors", "config.json")
    RobertaForMaskedLM(config(vocab_size=300)).save_pretrained(small)
    assert "its tokenizer has 310 tokens, its encoder knows 300" in why(small)


def test_weights_that_do_not_fit(roberta_folder, tmp_path):
    shutil.copytree(roberta_folder, tmp_path / "r")
    file = tmp_path / "r" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks \d+ weights in .*first encoder.layer.2"):
        load_roberta(str(tmp_path / "r"), **CPU)
