"""From names to scorers: published layouts as ordinary files, the hub, the cache of loaded ones, mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import serve
from huggingface_hub import constants
from reward_helpers import LAYOUT, pictures, save_clip, save_hps, tiny_clip, to_open_clip
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer

from align_cli import registry
from align_cli.errors import UserError
from align_cli.rewards import aesthetic, towers
from align_cli.rewards.aesthetic import AestheticHead
from align_cli.rewards.loading import forget_rewards, load_reward

X, PROMPTS = pictures(2), ["a red circle", "two blue squares"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, an empty cache of the hub, and no reward loaded."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    forget_rewards()
    yield
    forget_rewards()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_clip()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder. Do not write into it."""
    return save_clip(tmp_path_factory.mktemp("clip") / "model", model)


@pytest.fixture(scope="module")
def hps(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HPSv2's file. Do not write into it."""
    return save_hps(tmp_path_factory.mktemp("hps") / "model", model)


def refused(match: str, name: str, source: object = None, **options: Any) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError, match=match) as found:
        load_reward(name, source=None if source is None else str(source), **options)
    assert "\n" not in str(found.value)
    return str(found.value)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["clip", "clip-b32", "clip-g14", "pickscore", "denscore"])
def test_transformers_folder(name, folder, model):
    reward = load_reward(name, source=str(folder))
    facts = reward.facts()
    assert facts["source"] == str(folder) and facts["name"] == name
    assert facts["version"].startswith("other sizes than")  # it is no published model, and says so
    scores = reward.score(X, PROMPTS)
    size = LAYOUT["vision_cfg"]["image_size"]
    ids = tiny_tokenizer()(
        [p + "." * (name == "denscore") for p in PROMPTS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=reward.way(X, size), **ids)
    wanted = (out.image_embeds * out.text_embeds).sum(-1)
    if name == "pickscore":
        torch.testing.assert_close(out.logits_per_image.diagonal(), wanted * torch.tensor(3.0).exp())
        wanted = out.logits_per_image.diagonal()
        assert "logit_scale" in facts["scale"]
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)


def test_all_layouts_give_one_score(folder, hps, model, tmp_path):
    """Pickle and safetensors, transformers and open_clip, folder and file, one file and shards."""
    wanted = load_reward("clip", source=str(folder)).score(X, PROMPTS)
    pickled = save_clip(tmp_path / "pickled", model, safe=False)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="8KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    tiny_tokenizer().save_pretrained(sharded)
    open_clip = tmp_path / "open_clip"
    open_clip.mkdir()
    save_file(to_open_clip(model.state_dict()), open_clip / "open_clip_model.safetensors")
    (open_clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": LAYOUT}))
    tiny_tokenizer().save_pretrained(open_clip / "tokenizer")
    index = sharded / "model.safetensors.index.json"
    for source in (
        pickled,
        sharded,
        index,
        open_clip,
        folder / "model.safetensors",
        hps / "HPS_v2_compressed.pt",
    ):
        found = load_reward("clip", source=str(source)).score(X, PROMPTS)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=str(source))


def test_hpsv2_file(hps, folder, model, tmp_path):
    """HPSv2: cosine without logit scale, its own preprocessing; both versions from their own files."""
    reward = load_reward("hpsv2", source=str(hps))
    assert "longest side" in reward.preprocessing and reward.scale == "cosine of image and text"
    with torch.no_grad():
        ids = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
        out = model(pixel_values=reward.way(X, 16), **ids)
    torch.testing.assert_close(
        reward.score(X, PROMPTS), (out.image_embeds * out.text_embeds).sum(-1), atol=1e-5, rtol=1e-5
    )
    other = save_hps(tmp_path / "both", tiny_clip(5), "HPS_v2.1_compressed.pt")
    save_hps(tmp_path / "both", model)
    new = load_reward("hpsv2.1", source=str(other))
    assert "v2.1" in new.version and "v2.0" in reward.version
    assert not torch.allclose(new.score(X, PROMPTS), reward.score(X, PROMPTS), atol=1e-3)
    assert torch.equal(load_reward("hpsv2", source=str(other)).score(X, PROMPTS), reward.score(X, PROMPTS))
    sharp = load_reward("hpsv2", source=str(hps), preprocessing="no-antialias")
    assert not torch.equal(sharp.score(X, PROMPTS), reward.score(X, PROMPTS))
    assert "without antialiasing" in sharp.facts()["preprocessing"]


def test_versions_say_what_is_known(hps, folder, tmp_path, monkeypatch):
    """Weights that the user names are not called the published ones because they are as large."""
    for name in ("ViT-L-14", "ViT-H-14"):
        monkeypatch.setitem(towers.LAYOUTS, name, LAYOUT)
    assert load_reward("clip", source=str(folder)).version == "ViT-L/14 openai by its sizes"
    assert load_reward("hpsv2", source=str(hps)).version == "v2.0"
    assert load_reward("hpsv2", source=str(hps / "HPS_v2_compressed.pt")).version == "v2.0"
    other = shutil.copytree(hps, tmp_path / "other")
    (other / "HPS_v2_compressed.pt").rename(other / "mine.pt")
    assert load_reward("hpsv2", source=str(other / "mine.pt")).version == "v2.0 by its sizes"
    assert load_reward("tiny-clip").version == "shapes world, 32 px"
    assert load_reward("tiny-clip", source=str(folder)).version == "other weights than shapes world, 32 px"


def save_head(folder: Path, width: int, name: str = "sac+logos+ava1-l14-linearMSE.pth") -> dict[str, Any]:
    torch.manual_seed(2)
    state = AestheticHead(width).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name, _use_new_zipfile_serialization="old" not in name)
    return state


def test_aesthetic_folder(model, tmp_path):
    """The official file beside the tower; its layers collapse to one affine map."""
    home = save_clip(tmp_path / "both", model)
    state = save_head(home, LAYOUT["embed_dim"])
    reward = load_reward("aesthetic", source=str(home))
    assert reward.version.startswith("LAION aesthetic v2, unknown head")
    with torch.no_grad():
        features = model.get_image_features(reward.way(X, 16)).pooler_output
    value = features / features.norm(dim=-1, keepdim=True)
    for k in (0, 2, 4, 6, 7):
        value = value @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
    torch.testing.assert_close(reward.score(X, ["", ""]), value[:, 0], atol=1e-5, rtol=1e-5)
    save_head(tmp_path / "both", LAYOUT["embed_dim"], "old.pth")  # torch's format before 1.6
    old = load_reward("aesthetic", source=str(home / "old.pth"))
    assert torch.equal(old.score(X, ["", ""]), reward.score(X, ["", ""]))
    assert list(state) == [f"layers.{k}.{kind}" for k in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    shapes = [tuple(state[f"layers.{k}.weight"].shape) for k in (2, 4, 6, 7)]
    assert shapes == [(128, 1024), (64, 128), (16, 64), (1, 16)]


def test_the_official_head_is_known_by_its_numbers(tmp_path, monkeypatch):
    state = save_head(tmp_path, 4)
    monkeypatch.setattr(aesthetic, "OFFICIAL_HEAD", aesthetic.head_hash(state))
    assert aesthetic._version(dict(reversed(state.items()))).endswith("sac+logos+ava1-l14-linearMSE")


def test_dtype_and_preprocessing(folder):
    plain = load_reward("clip", source=str(folder))
    half = load_reward("clip", source=str(folder), dtype=torch.bfloat16)
    assert half.facts()["dtype"] == "bfloat16" and half.model.visual_projection.weight.dtype == torch.bfloat16
    assert half.model.logit_scale.dtype == torch.float32
    score = half.score(X, PROMPTS)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, plain.score(X, PROMPTS), atol=0.05, rtol=0)
    pooled = load_reward("clip", source=str(folder), preprocessing="textcraftor")
    assert pooled.facts()["preprocessing"].startswith("textcraftor: adaptive average pooling")
    assert not torch.equal(pooled.score(X, PROMPTS), plain.score(X, PROMPTS))


def test_frozen(folder):
    reward = load_reward("clip", source=str(folder))
    assert not reward.model.training and not any(p.requires_grad for p in reward.model.parameters())
    assert not any(x.is_meta for x in (*reward.model.parameters(), *reward.model.buffers()))


# ---------------------------------------------------------------- loaded once


def test_loaded_once(folder, monkeypatch):
    first = load_reward("clip", source=str(folder))
    monkeypatch.chdir(folder.parent)
    assert load_reward("clip", source=folder.name, device="cpu") is first
    others = [
        load_reward("pickscore", source=str(folder)),
        load_reward("clip", source=str(folder), preprocessing="textcraftor"),
        load_reward("clip", source=str(folder), dtype=torch.bfloat16),
    ]
    assert all(other is not first for other in others)
    assert load_reward("tiny-clip") is load_reward("tiny-clip")
    forget_rewards()
    assert load_reward("clip", source=str(folder)) is not first


# ---------------------------------------------------------------- the hub


def test_hub(model, tmp_path, monkeypatch):
    """Fetched once, one file of weights each, then offline; HPSv2's repository has no tokenizer."""
    root = tmp_path / "hub"
    pick = save_clip(root / "yuvalkirstain" / "PickScore_v1", model)
    torch.save({}, pick / "pytorch_model.bin")
    save_hps(root / "xswu" / "HPSv2", model)
    for file in (root / "xswu" / "HPSv2").glob("tokenizer*"):
        file.unlink()
    (root / "xswu" / "HPSv2" / "config.json").write_text("{}")  # of something else
    tiny_tokenizer().save_pretrained(root / "openai" / "clip-vit-large-patch14")
    with serve(root, tmp_path / "cache", monkeypatch) as log:
        wanted = load_reward("pickscore").score(X, PROMPTS)
        assert load_reward("pickscore").source == "yuvalkirstain/PickScore_v1"
        assert "model.safetensors" in log and "pytorch_model.bin" not in log
        log.clear()
        second = load_reward("hpsv2").score(X, PROMPTS)
        assert "HPS_v2_compressed.pt" in log and "tokenizer.json" in log
        assert "HPS_v2.1" in refused("the hub's xswu/HPSv2 holds no HPS_v2.1_compressed.pt", "hpsv2.1")
        log.clear()
        forget_rewards()
        assert torch.equal(load_reward("pickscore").score(X, PROMPTS), wanted)
        assert not log
        refused("org/gated.*licence.*--weights clip=PATH", "clip", "org/gated")
        refused("the hub has no model org/none", "clip", "org/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_rewards()
    assert torch.equal(load_reward("pickscore").score(X, PROMPTS), wanted)
    assert torch.equal(load_reward("hpsv2").score(X, PROMPTS), second)


# ---------------------------------------------------------------- mistakes


def test_unknown_names(folder):
    assert "did you mean 'pickscore'" in refused("unknown reward 'pikscore'", "pikscore")
    refused("clip: unknown preprocessing 'texcraftor'; did you mean 'textcraftor'", "clip", folder,
            preprocessing="texcraftor")  # fmt: skip
    refused("clip: unknown preprocessing 'no-antialias'", "clip", folder, preprocessing="no-antialias")
    refused("shapes: unknown preprocessing 'textcraftor'", "shapes", preprocessing="textcraftor")
    refused("unknown device 'gpu'", "tiny-clip", device="gpu")
    refused("shapes has no weights; leave --weights shapes=here out", "shapes", "here")


@pytest.mark.parametrize(
    "name", sorted({*registry.REWARDS} - {"shapes", "tiny-blip", "tiny-clip", "tiny-denscore", "vqascore"})
)
def test_missing_weights_name_file_place_and_option(name):
    line = refused("not in the local cache and the hub cannot be reached", name)
    assert f"--weights {name}=PATH" in line
    assert re.search(r"\.(pt|pth|safetensors|bin|json)\b", line) and re.search(r"of \S+/\S+ is not", line)


def test_bad_places(folder, tmp_path):
    refused("'nothing' is neither a file, a folder nor a hub id", "clip", "nothing")
    refused("'./no/where' is neither", "clip", "./no/where")
    refused("'weights/HPS_v2.pt' is neither", "clip", "weights/HPS_v2.pt")
    refused(rf"{re.escape(str(tmp_path))} holds no model.safetensors or", "clip", tmp_path)
    refused("holds no HPS_v2_compressed.pt", "hpsv2", folder)


def test_damaged_and_misfitting_files(folder, hps, model, tmp_path):
    for file in ("bad.safetensors", "bad.pt", "bad.bin"):
        (tmp_path / file).write_bytes(b"not weights at all")
        refused(rf"{file} (cannot be read|holds more than)", "clip", tmp_path / file)
    (tmp_path / "empty.pt").write_bytes(b"")
    refused("empty.pt cannot be read", "clip", tmp_path / "empty.pt")
    torch.save({"state_dict": {"a": object}}, tmp_path / "objects.pt")
    refused("holds more than tensors", "clip", tmp_path / "objects.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    refused("no dictionary of named tensors", "clip", tmp_path / "list.pt")

    home = save_clip(tmp_path / "home", model)
    state = load_file(home / "model.safetensors")
    short = {k: x for k, x in state.items() if k != "logit_scale"}
    save_file(short | {"more": torch.zeros(1)}, home / "model.safetensors")
    refused("1 weights are missing, first logit_scale; 1 weights are unknown, first more", "clip", home)
    save_file(state | {"logit_scale": torch.zeros(2)}, home / "model.safetensors")
    refused(r"logit_scale is \[2\], wanted is \[\]", "clip", home)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "HPS_v2_compressed.pt").write_bytes((hps / "HPS_v2_compressed.pt").read_bytes())
    tiny_tokenizer().save_pretrained(alone)
    refused("hpsv2: .*weights are missing", "hpsv2", alone)  # without a configuration: the published sizes


def test_refused_configurations(model, tmp_path):
    home = save_clip(tmp_path / "home", model)
    (home / "config.json").write_text('{"model_type": "siglip"}')
    refused("is of a siglip model, not of a CLIP model", "clip", home)
    (home / "config.json").write_text("{")
    refused("config.json cannot be read", "clip", home)
    (home / "config.json").write_text("[]")
    refused("config.json is not a JSON object", "clip", home)
    (home / "config.json").unlink()
    (home / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
    refused("open_clip_config.json is no configuration of a CLIP model", "clip", home)


def test_other_version_of_hpsv2(model, tmp_path):
    home = save_hps(tmp_path / "home", model, "HPS_v2.1_compressed.pt")
    refused("hpsv2 is HPS v2.0, but .* holds v2.1; score with hpsv2.1 instead", "hpsv2",
            home / "HPS_v2.1_compressed.pt")  # fmt: skip


def test_no_tokenizer(model, tmp_path):
    home = save_clip(tmp_path / "home", model, with_tokenizer=False)
    line = refused(r"no tokenizer \(tokenizer.json, or vocab.json and merges.txt\)", "clip", home)
    assert "openai/clip-vit-large-patch14" in line and "--weights clip=PATH" in line
    (home / "tokenizer.json").write_text("{")
    refused("the tokenizer in .* cannot be loaded", "clip", home)


def test_aesthetic_mistakes(model, tmp_path):
    home = save_clip(tmp_path / "both", model)
    save_head(home, 7)
    refused("reads 7-wide features, but the tower of .* gives 12", "aesthetic", home)
    save_head(tmp_path / "head", LAYOUT["embed_dim"])
    line = refused("openai/clip-vit-large-patch14 is not in the local cache", "aesthetic", tmp_path / "head")
    assert "beside it, config.json and model.safetensors" in line
    torch.save({"layers.0.weight": torch.zeros(1024, 12)}, home / "sac+logos+ava1-l14-linearMSE.pth")
    refused("9 weights are missing", "aesthetic", home)
