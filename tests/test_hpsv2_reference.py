"""Our HPSv2 against the official package's code, on a tiny random model in its own layout; how its wheel is
repaired, and what is said where that cannot be.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from align_cli.errors import UserError
from align_cli.pictures import to_uint8
from align_cli.rewards import hpsv2_reference as reference
from align_cli.rewards.cleaning import clean
from align_cli.rewards.clip import HPS_FILES
from align_cli.rewards.loading import load_reward

LAYOUT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 80, "head_width": 40, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
}
"""The official ViT-H-14, smaller. The vocabulary is CLIP's, as always."""
PROMPTS = [
    "a red dog", "", "A Photo, of \t two  Cats!", "it's 3 o'clock & 12345 #tags; caf\u00e9 na\u00efve",
    "bread &amp; butter &lt;3", "word " * 200, "\u4e00 \u00bd \U0001f600 \u00fcber",
    "a \u201ccurly\u201d sign",
]  # fmt: skip


@pytest.fixture
def absent(monkeypatch):
    """A machine on which packages of some names are not there."""
    found = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(reference, "find_spec", lambda name: None if name in names else found(name))

    return hide


def test_absent_package(absent, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, reference.PACKAGE, raising=False)
    absent("hpsv2")
    with pytest.raises(UserError, match=r"pip install 't2ialign\[hpsv2\]'"):
        reference.import_official()


def test_absent_and_wrong_vocabulary(absent, tmp_path):
    absent("open_clip", "clip")
    with pytest.raises(UserError, match=r"open_clip_torch.*merges\.txt.*--weights hpsv2=PATH"):
        reference._vocabulary([tmp_path])
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\nt h\n")
    with pytest.raises(UserError, match=r"merges\.txt holds another vocabulary"):
        reference._vocabulary([tmp_path])


def test_repair_ends(tmp_path):
    """Only the missing file is another one, and only inside."""
    other = tmp_path / "other.gz"
    other.write_bytes(gzip.compress(b"other"))
    opened, before = gzip.open, sys.modules.get("turtle")
    with reference._repaired(b"merges"):
        with gzip.open(f"/nowhere/{reference.VOCABULARY}") as missing, gzip.open(other) as there:
            assert (missing.read(), there.read()) == (b"merges", b"other")
        assert sys.modules["turtle"] is not before
    assert gzip.open is opened and sys.modules.get("turtle") is before


# ---------------------------------------------------------------- with the package


@pytest.fixture(scope="module")
def official():
    return reference.import_official()


@pytest.fixture(scope="module")
def folder(official, tmp_path_factory) -> Path:
    """A random model of the official class, saved as the published files are, CLIP's tokenizer beside it."""
    home = tmp_path_factory.mktemp("hpsv2")
    (home / "tiny-hps.json").write_text(json.dumps(LAYOUT))
    (home / "open_clip_config.json").write_text(json.dumps({"model_cfg": LAYOUT}))
    official.add_model_config(home / "tiny-hps.json")
    for seed, name in enumerate(HPS_FILES.values()):
        torch.manual_seed(seed)
        model = official.create_model("tiny-hps", output_dict=True)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, home / name)
    words = sys.modules[f"{reference.PACKAGE}.tokenizer"]._tokenizer
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (home / "vocab.json").write_text(json.dumps({names.get(w, w): i for w, i in words.encoder.items()}))
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.__getitem__)
    (home / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8"
    )
    return home


def pictures(height: int, width: int, count: int) -> torch.Tensor:
    return (
        torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height)).mul(255).round()
        / 255
    )


@pytest.mark.hpsv2
@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_ours_equals_the_official_code(folder, name):
    ours = load_reward(name, source=str(folder))
    theirs = reference.load_reference(name, source=str(folder), layout=folder / "tiny-hps.json")
    for height, width in ((28, 28), (64, 64), (50, 90), (90, 50), (9, 13)):
        images = pictures(height, width, len(PROMPTS))
        got, wanted = ours.score(images, PROMPTS), theirs.score(images, PROMPTS)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert not theirs.differentiable and theirs.facts()["name"] == f"{name}-reference"
    seen = torch.cat([images, torch.rand(len(PROMPTS), 1, 9, 13)], 1)
    torch.testing.assert_close(theirs.score(seen, PROMPTS), wanted)


@pytest.mark.hpsv2
def test_official_score_function(folder, tmp_path, monkeypatch):
    """`hpsv2.score` itself, its cache filled with the tiny model so that it fetches nothing."""
    theirs = reference.load_reference("hpsv2", source=str(folder), layout=folder / "tiny-hps.json")
    from hpsv2 import img_score

    monkeypatch.setattr(img_score, "root_path", str(tmp_path))
    monkeypatch.setattr(img_score, "model_dict", {"model": theirs.model, "preprocess_val": theirs.preprocess})
    images, ours = pictures(40, 33, 2), load_reward("hpsv2", source=str(folder))
    for i, prompt in enumerate(PROMPTS[2:4]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(to_uint8(images[i : i + 1])[0]).save(path)
        (wanted,) = img_score.score(str(path), prompt, cp=str(folder / HPS_FILES["v2.0"]), hps_version="v2.0")
        assert float(theirs.score(images[i : i + 1], [prompt])) == pytest.approx(float(wanted), abs=1e-6)
        assert float(ours.score(images[i : i + 1], [prompt])) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.hpsv2
def test_tokens(official, folder):
    """Once a text is cleaned, transformers' tokenizer cuts it into the same pieces."""
    ours = load_reward("hpsv2", source=str(folder))
    texts = [*PROMPTS, "a corgi\u2019s head", "the word \u2018openai\u2019 and \u201cmore\u201d", "\ufb01re"]
    wanted = official.tokenize(texts)
    got = ours.tokenizer([clean(text) for text in texts], max_length=77, truncation=True)
    for mine, theirs in zip(got["input_ids"], wanted.tolist(), strict=True):
        assert mine == theirs[: theirs.index(49407) + 1]


@pytest.mark.hpsv2
def test_audit(folder):
    """What the official tokenizer cuts is what ours cuts."""
    theirs = reference.load_reference("hpsv2", source=str(folder), layout=folder / "tiny-hps.json")
    ours = load_reward("hpsv2", source=str(folder))
    texts = [*PROMPTS, "red " * 74 + "supercalifragilistic dogs &amp; cats", "red " * 75, "red " * 76]
    assert theirs.audit(texts) == ours.audit(texts)
    assert [cut.lost for cut in theirs.audit(texts)[-3:]] == ["supercalifragilistic dogs & cats", "", "red"]


@pytest.mark.hpsv2
def test_vocabulary_from_either_place(official, folder, absent):
    """open_clip_torch's file and a tokenizer's folder give the same bytes; the package stays as it was."""
    shipped = reference._vocabulary([])
    absent("open_clip", "clip")
    assert reference._vocabulary([folder]) == shipped
    assert not (Path(official.__file__).parent / reference.VOCABULARY).exists()


@pytest.mark.hpsv2
def test_misfitting_weights(folder, tmp_path):
    state = torch.load(folder / HPS_FILES["v2.0"], weights_only=True)["state_dict"]
    del state["visual.proj"]
    torch.save({"state_dict": state}, tmp_path / HPS_FILES["v2.0"])
    with pytest.raises(UserError, match="does not fit"):
        reference.load_reference("hpsv2", source=str(tmp_path), layout=folder / "tiny-hps.json")
