"""ImageReward as a reward: files, pictures, prompts. Its numbers are golden (tests/golden/imagereward)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from align_cli.errors import UserError
from align_cli.rewards.base import Cut
from align_cli.rewards.imagereward_net import ImageRewardNet
from align_cli.rewards.loading import load_reward

CASE = Path(__file__).parent / "golden" / "imagereward" / "tiny"
FACTS = json.loads((CASE / "case.json").read_text())
PROMPTS = FACTS["prompts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The golden network as published: a pickle of tensors, and BERT's vocabulary. Do not write into it."""
    home = tmp_path_factory.mktemp("imagereward")
    state = {
        k: x.float() if x.is_floating_point() else x for k, x in load_file(CASE / "state.safetensors").items()
    }
    torch.save(state, home / "ImageReward.pt")
    (home / "vocab.txt").write_text("\n".join(FACTS["vocab"]) + "\n")
    return home


@pytest.fixture
def reward(folder):
    return load_reward("imagereward", source=str(folder))


def expected() -> list[float]:
    tensors = load_file(CASE / "tensors.safetensors")
    return [float(tensors[f"{i}.reward"]) for i in range(len(PROMPTS))]


def test_from_folder_and_file(folder, reward):
    picture = load_file(CASE / "tensors.safetensors")["0.picture"].float()[None] / 255
    for source in (folder, folder / "ImageReward.pt"):
        got = load_reward("imagereward", source=str(source)).score(picture, PROMPTS[:1])
        assert got.dtype == torch.float32 and got.tolist() == pytest.approx(expected()[:1], rel=1e-5)
    assert reward.facts()["version"] == "other sizes than ImageReward-v1.0" and reward.differentiable


def test_published_sizes():
    """Shapes of the published file: BLIP's ViT-L/16 at 224 pixels, and BERT-base with two words more."""
    shapes = {
        "vision.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
        "vision.embeddings.position_embedding": (1, 197, 1024),
        "text.embeddings.word_embeddings.weight": (30524, 768),
        "text.embeddings.position_embeddings.weight": (512, 768),
    }
    shapes |= {f"vision.encoder.layers.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)}
    shapes |= {f"text.encoder.layer.{i}.intermediate.dense.weight": (3072, 768) for i in range(12)}
    with torch.device("meta"):
        net = ImageRewardNet({k: torch.Size(v) for k, v in shapes.items()})
    assert net.published and net.image_size == 224
    assert net.vision.config.num_attention_heads == 16 and net.text.config.num_attention_heads == 12


def test_pictures_are_scored_alone(reward):
    images = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    together = reward.score(images, PROMPTS[:3])
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    seen = torch.cat([images, torch.rand(3, 1, 20, 30)], 1)
    torch.testing.assert_close(reward.score(seen, PROMPTS[:3]), together)
    grey = images[:, :1]
    torch.testing.assert_close(
        reward.score(grey, PROMPTS[:3]), reward.score(grey.repeat(1, 3, 1, 1), PROMPTS[:3])
    )


def test_gradient_follows_the_score(reward):
    """Up the gradient the reward rises: pictures of the tower's own size, so that nothing is rounded."""
    image = torch.full((1, 3, 224, 224), 0.5, requires_grad=True)
    before = reward.score(image, PROMPTS[:1])
    before.sum().backward()
    step = 1e-3 * image.grad / image.grad.abs().max()
    pushed = (image.detach() + step).requires_grad_()
    rise = float((reward.score(pushed, PROMPTS[:1]) - before).detach())
    assert rise == pytest.approx(float((image.grad * step).sum()), rel=0.05)
    assert all(p.grad is None and not p.requires_grad for p in reward.net.parameters())


def test_audit(reward):
    assert reward.audit(["a red dog", ""]) == [Cut(35, 5, ""), Cut(35, 2, "")]
    (cut,) = reward.audit(["two " * 33 + "pink dogs , and cats"])
    assert cut == Cut(35, 42, "pink dogs , and cats")
    (cut,) = reward.audit(["two " * 32 + "greenish cat"])  # "green" is read, "##ish" is not
    assert cut.lost == "greenish cat"
    (cut,) = reward.audit(["two " * 32 + "dog,cat"])  # words end where no letter follows
    assert cut.lost == ",cat"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blip.visual_encoder.norm.bias"), "missing"),
        (lambda s: s.update({"blip.other.weight": torch.zeros(1)}), "blip.other.weight"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "position_embedding"),
        (
            lambda s: s.update({"mlp.layers.0.weight": torch.zeros(1024, 65)}),
            "mlp.layers.0.weight|head.layers.0",
        ),
    ],
)
def test_other_weights(folder, tmp_path, change, words):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    shutil.copy(folder / "vocab.txt", tmp_path)
    with pytest.raises(UserError, match=words):
        load_reward("imagereward", source=str(tmp_path))


def test_missing_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"ImageReward\.pt.*--weights imagereward=PATH"):
        load_reward("imagereward", source=str(tmp_path))
    shutil.copy(folder / "ImageReward.pt", tmp_path)
    with pytest.raises(UserError, match=r"vocab\.txt.*--weights imagereward=PATH"):
        load_reward("imagereward", source=str(tmp_path))
    with pytest.raises(UserError, match="preprocessing"):
        load_reward("imagereward", source=str(folder), preprocessing="textcraftor")
