"""The caption score as a reward; its numbers are golden (comat/blip_caption_loss)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPConfig

from align_cli import registry
from align_cli.errors import UserError
from align_cli.rewards.blip_caption import LABEL_SMOOTHING
from align_cli.rewards.captioning import UNSCORED, smoothed_losses
from align_cli.rewards.loading import load_reward
from align_cli.shapes.build import captioner, contrastive

CASE = Path(__file__).parent / "golden" / "imagereward" / "tiny" / "case.json"
VOCABULARY = json.loads(CASE.read_text())["vocab"]
PROMPTS = ["a red dog", "two greenish dogs on a blue bench", ""]


@pytest.fixture(scope="module", params=[24, 32], ids=["base", "large"])
def folder(tmp_path_factory, request) -> Path:
    """A tiny BLIP as transformers saves it: both towers of one width, or a wider one for pictures. Do not
    write into it.
    """
    home = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BlipConfig(
        text_config=sizes | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 16},
        vision_config=sizes | {"hidden_size": request.param, "image_size": 32, "patch_size": 8},
    )
    model = BlipForConditionalGeneration(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(home)
    (home / "vocab.txt").write_text("\n".join(VOCABULARY))
    return home


@pytest.fixture
def reward(folder):
    return load_reward("blip-caption", source=str(folder))


def test_smoothed_loss_by_hand():
    logits = torch.tensor([[[2.0, 0.0, 0.0, 0.0]] * 4])
    labels = torch.tensor([[UNSCORED, 0, 1, UNSCORED]])
    log_z = math.log(math.exp(2) + 3)
    one = 0.9 * (log_z - 2) + 0.1 * (log_z - 0.5)
    other = 0.9 * log_z + 0.1 * (log_z - 0.5)
    torch.testing.assert_close(smoothed_losses(logits, labels, LABEL_SMOOTHING), torch.tensor([one + other]))
    torch.testing.assert_close(
        smoothed_losses(torch.zeros(1, 4, 4), labels, LABEL_SMOOTHING), torch.tensor([2 * math.log(4)])
    )


def test_scores(reward):
    images = torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    score = reward.score(images, PROMPTS)
    assert score.shape == (3,) and bool((score < 0).all())
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score, alone, rtol=1e-5, atol=1e-6)
    score[1].backward()
    assert images.grad[1].abs().max() > 0 and not images.grad[[0, 2]].any()


def test_batch_score_weighs_by_tokens(reward):
    """The prompt's 3, 8 and 0 pieces, and each time the end."""
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    count = torch.tensor([4.0, 10.0, 1.0])
    assert torch.equal(reward.token_losses(images, PROMPTS)[1], count)
    assert torch.equal(reward.token_counts(PROMPTS), count)
    wanted = (reward.score(images, PROMPTS) * count).sum() / count.sum()
    torch.testing.assert_close(reward.batch_score(images, PROMPTS), wanted)


def test_tied_and_untied_files_are_one_model(folder, reward):
    decoder = reward.model.text_decoder
    torch.testing.assert_close(
        decoder.cls.predictions.decoder.weight, decoder.bert.embeddings.word_embeddings.weight
    )
    saved = BlipForConditionalGeneration.from_pretrained(folder)
    for key, x in saved.state_dict().items():
        torch.testing.assert_close(reward.model.state_dict()[key], x)


def test_long_prompt_is_cut(reward):
    (cut,) = reward.audit(["dog " * 11 + "cat fork"])
    assert (cut.limit, cut.tokens, cut.lost) == (16, 18, "cat fork")
    assert reward.audit(["dog " * 10 + "cat,fork"])[0].lost == ",fork"
    image = torch.full((1, 3, 32, 32), 0.5)
    torch.testing.assert_close(reward.score(image, ["dog " * 10_000]), reward.score(image, ["dog " * 11]))


def test_another_model(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of a clip model, not of BLIP"):
        load_reward("blip-caption", source=str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json.*--weights blip-caption=PATH"):
        load_reward("blip-caption", source=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_tiny_blip(split):
    """It tells captions from hard negatives, and says so in its card; unmoved by a little noise."""
    reward = load_reward("tiny-blip")
    card = json.loads((registry.WEIGHTS / "tiny-blip" / "card.json").read_text())
    assert reward.facts()["source"] == "embedded:tiny-blip"
    found = captioner.evaluate(reward, split, 200)
    assert found["hard_negative"] == pytest.approx(card["measured_fp16"][f"{split}_hard_negative"], abs=0.06)
    assert found["hard_negative"] > 0.85 and found["score"] > -1.2
    x, prompts, false = contrastive.examples(50, np.random.default_rng(5), split)
    x = (x / 2 + 0.5)[:50] + 0.05 * torch.randn(50, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    gains = reward.score(x, [p.text for p in prompts]) - reward.score(x, [p.text for p in false])
    assert (gains > 0).float().mean() > 0.8


def test_tiny_blip_slope():
    """A step along its gradient turns a picture towards what it is asked for."""
    reward = load_reward("tiny-blip")
    x, prompts, _ = contrastive.examples(8, np.random.default_rng(6), "test")
    image, others = (x / 2 + 0.5)[:8], [p.text for p in prompts[1:] + prompts[:1]]
    image.requires_grad_()
    before = reward.score(image, others)
    (slope,) = torch.autograd.grad(before.sum(), image)
    step = 0.5 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (reward.score(image + step, others) > before).float().mean() > 0.8
