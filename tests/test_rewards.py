"""The scorers: numbers worked out by hand, gradients, independence of neighbours, the oracle, the audit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reward_helpers import LAYOUT, SIZE, pictures, tiny_clip, to_open_clip
from tiny_models import tiny_tokenizer
from torch import nn

from align_cli.errors import UserError
from align_cli.losses import common_direction, preference_loss, reweight_text
from align_cli.rewards import preprocess
from align_cli.rewards.aesthetic import Aesthetic, AestheticHead
from align_cli.rewards.base import Cut, rgb
from align_cli.rewards.clip import ClipReward
from align_cli.rewards.denscore import Denscore
from align_cli.rewards.loading import load_reward
from align_cli.rewards.towers import LAYOUTS, clip_config, from_open_clip
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.oracle import METRICS
from align_cli.shapes.world import render, sample_scenes

FACTS = {"name": "test", "version": "1", "source": "here", "scale": "cosine"}
PROMPTS = ["a red circle", "a blue square on a white background", "two green triangles"]


class GivenTowers:
    """Towers whose features are given: of a picture by its mean, of a text by the number of its tokens."""

    def __init__(self, image: list[float], texts: dict[int, list[float]], logit_scale: float = 0.0) -> None:
        self.image, self.texts = torch.tensor(image), texts
        self.logit_scale = torch.tensor(logit_scale)
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=4),
            text_config=SimpleNamespace(max_position_embeddings=32),
        )

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.image.repeat(len(pixel_values), 1)

    def get_text_features(self, input_ids: torch.Tensor) -> Any:
        end = tiny_tokenizer().eos_token_id
        counts = [int((row == end).int().argmax()) - 1 for row in input_ids]
        return SimpleNamespace(pooler_output=torch.tensor([self.texts[n] for n in counts]))


def given(cls: type = ClipReward, **options: Any) -> Any:
    texts = {1: [5.0, 0.0], 2: [0.0, 2.0], 3: [-1.0, 0.0]}
    towers = GivenTowers([3.0, 4.0], texts, logit_scale=math.log(10))
    return cls(model=towers, tokenizer=tiny_tokenizer(), way=preprocess.SHORTEST, **options, **FACTS)


def test_cosine_by_hand():
    x = pictures(3)
    score = given().score(x, ["red", "red circle", "a red circle"])
    torch.testing.assert_close(score, torch.tensor([0.6, 0.8, -0.6]))
    scaled = given(scaled=True)
    torch.testing.assert_close(scaled.score(x, ["red", "red circle", "a red circle"]), score * 10)
    torch.testing.assert_close(scaled.matrix(x[:1], ["red", "red circle"]), torch.tensor([[6.0], [8.0]]))


def test_denscore_by_hand():
    """Mean of the sentences' cosines, whatever their length; the mean vector keeps its length."""
    dense = given(Denscore)
    dense.model.texts = {2: [0.0, 2.0], 3: [5.0, 0.0]}  # "red." is two tokens, "red circle." three
    score = dense.score(pictures(2), ["red.red circle.", "red."])
    torch.testing.assert_close(score, torch.tensor([0.7, 0.8]))
    torch.testing.assert_close(dense.text_vectors(["red.red circle."]), torch.tensor([[0.5, 0.5]]))
    found = dense.sentence_scores(pictures(1)[0], "red.red circle.")
    assert [s for s, _ in found] == ["red.", "red circle."]
    assert [v for _, v in found] == pytest.approx([0.8, 0.6])


def test_preference_decomposition_by_hand():
    texts = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    direction = common_direction(texts)  # mean (0.8, 0.4)
    torch.testing.assert_close(direction, torch.tensor([2.0, 1.0]) / math.sqrt(5))
    plain = reweight_text(texts, direction, 0.0)
    torch.testing.assert_close(plain @ direction, torch.zeros(2), atol=1e-7, rtol=0)
    torch.testing.assert_close(plain, torch.tensor([[-0.2, 0.4], [0.2, -0.4]]))  # eta = 2 / sqrt(5) for both
    assert torch.equal(reweight_text(texts, direction, 1.0), texts)
    others = torch.tensor([[0.0, 1.0]])  # mean of the means: (0.4, 0.7)
    torch.testing.assert_close(common_direction(texts, others), torch.tensor([4.0, 7.0]) / math.sqrt(65))
    assert float(preference_loss(torch.tensor([0.2, 0.4]), 0.3)) == pytest.approx(0.35 - 0.063)


class GivenTower(nn.Module):
    config = SimpleNamespace(image_size=4)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(image_embeds=torch.tensor([[3.0, 4.0]]).repeat(len(pixel_values), 1))


def test_aesthetic_by_hand():
    head = AestheticHead(2).eval()
    with torch.no_grad():
        for layer in head.layers:
            if isinstance(layer, nn.Linear):
                layer.weight.zero_(), layer.bias.zero_()
                layer.weight[0, 0] = 2.0
        head.layers[7].bias.fill_(5.0)
    reward = Aesthetic(tower=GivenTower(), head=head, way=preprocess.SHORTEST, **FACTS)
    score = reward.score(pictures(2), ["", "whatever"])
    torch.testing.assert_close(score, torch.full((2,), 0.6 * 2**5 + 5))  # no activation between the layers
    assert reward.audit(["a b"]) == [Cut(0, 0, "")]


# ---------------------------------------------------------------- real towers, tiny


@pytest.fixture(scope="module")
def rewards() -> dict[str, Any]:
    """Every class of reward with gradients, on one tiny CLIPModel."""
    model = tiny_clip().requires_grad_(False)
    common = {"model": model, "tokenizer": tiny_tokenizer(), **FACTS}
    head = AestheticHead(LAYOUT["embed_dim"]).eval().requires_grad_(False)
    vision = GivenVision(model)
    return {
        "clip": ClipReward(way=preprocess.SHORTEST, scaled=True, **common),
        "hpsv2": ClipReward(way=preprocess.LONGEST, **common),
        "textcraftor": ClipReward(way=preprocess.TEXTCRAFTOR, **common),
        "denscore": Denscore(way=preprocess.LONGALIGN, **common),
        "aesthetic": Aesthetic(tower=vision, head=head, way=preprocess.SHORTEST, **FACTS),
    }


class GivenVision(nn.Module):
    """The image tower of a CLIPModel as CLIPVisionModelWithProjection gives it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config.vision_config

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(image_embeds=self.model.get_image_features(pixel_values).pooler_output)


NAMES = ("clip", "hpsv2", "textcraftor", "denscore", "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_do_not_matter(rewards, name):
    """A picture alone, among others, and with the others in another order, gets one score."""
    x, reward = pictures(3), rewards[name]
    together = reward.score(x, PROMPTS)
    assert together.shape == (3,) and together.dtype == torch.float32
    assert len({round(v, 4) for v in together.tolist()}) == 3  # else the test would show nothing
    alone = torch.cat([reward.score(x[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    turned = reward.score(x.flip(0), PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=0)
    torch.testing.assert_close(turned, together, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_scores(rewards, name):
    """Against central differences; a picture's gradient is its own; no weight gets one."""
    reward, generator = rewards[name], torch.Generator().manual_seed(1)
    x = 0.4 + 0.2 * torch.rand(2, 3, 20, 28, generator=generator)
    d = torch.randn(2, 3, 20, 28, generator=generator)
    y = x.clone().requires_grad_()
    scores = reward.score(y, PROMPTS[:2])
    (first,) = torch.autograd.grad(scores[0], y, retain_graph=True)
    assert float(first[0].abs().max()) > 0 and float(first[1].abs().max()) == 0
    (gradient,) = torch.autograd.grad(scores.sum(), y)
    ahead, behind = (
        float(reward.score((x + s * d).requires_grad_(), PROMPTS[:2]).sum()) for s in (5e-3, -5e-3)
    )
    assert float((gradient * d).sum()) == pytest.approx((ahead - behind) / 1e-2, rel=0.02, abs=2e-4)
    for part in (getattr(reward, "model", None), getattr(reward, "head", None)):
        assert part is None or all(p.grad is None for p in part.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_grey_and_alpha(rewards, name):
    reward, grey = rewards[name], pictures(2, channels=1)
    three = grey.expand(-1, 3, -1, -1)
    wanted = reward.score(three, PROMPTS[:2])
    assert torch.equal(reward.score(grey, PROMPTS[:2]), wanted)
    alpha = torch.cat([three, pictures(2, seed=9, channels=1)], 1)
    assert torch.equal(reward.score(alpha, PROMPTS[:2]), wanted)


def test_wrong_shapes(rewards):
    for wrong in (pictures(2)[0], pictures(2, channels=2), (pictures(2) * 255).byte()):
        with pytest.raises(ValueError, match="pictures must be"):
            rewards["clip"].score(wrong, PROMPTS[:2])
    with pytest.raises(ValueError, match="2 pictures but 3 prompts"):
        rewards["clip"].score(pictures(2), PROMPTS)
    assert rgb(pictures(2)).shape == (2, 3, 20, 28)


def test_matrix_has_the_scores_on_its_diagonal(rewards):
    x, reward = pictures(3), rewards["clip"]
    matrix = reward.matrix(x, PROMPTS)
    torch.testing.assert_close(matrix.diagonal(), reward.score(x, PROMPTS), atol=2e-5, rtol=0)
    torch.testing.assert_close(matrix[2, 0], reward.score(x[:1], PROMPTS[2:])[0], atol=2e-5, rtol=0)


def test_metrics_and_facts(rewards):
    reward = rewards["clip"]
    assert list(reward.metrics(pictures(1), PROMPTS[:1])) == [reward.headline] == ["test"]
    facts = reward.facts()
    assert facts["preprocessing"].startswith("official: shortest side") and facts["dtype"] == "float32"
    assert set(facts) == {"name", "version", "source", "preprocessing", "scale", "dtype"}


# ---------------------------------------------------------------- open_clip's layout


def test_key_map_is_the_inverse_of_the_published_layout():
    """HPSv2's file has 686 tensors and 986,109,441 numbers; every one has its place in a CLIPModel."""
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(clip_config(LAYOUTS["ViT-H-14"]))
    state = model.state_dict()
    published = to_open_clip(state)
    assert len(published) == 686
    assert sum(x.numel() for x in published.values()) == 986_109_441
    back = from_open_clip(published)
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in state.items()}


def test_key_map_keeps_the_numbers():
    model = tiny_clip()
    state = model.state_dict()
    back = from_open_clip(to_open_clip(state))
    assert all(torch.equal(back[k], x) for k, x in state.items()) and len(back) == len(state)


# ---------------------------------------------------------------- audit


def test_audit_names_the_lost_words(rewards):
    text = "a red circle " * 11 + "on the white background"
    assert rewards["clip"].audit(["a red circle"]) == [Cut(32, 5, "")]
    (cut,) = rewards["clip"].audit([text])
    assert (cut.limit, cut.tokens) == (32, 39) and cut.lost == "a red circle on the white background"
    score = rewards["clip"].score(pictures(2), [text, text + " and a blue square"])
    assert torch.equal(
        rewards["clip"].text_vectors([text])[0], rewards["clip"].text_vectors([text + " red"])[0]
    )
    assert score.shape == (2,)
    exact = " ".join(["red"] * 30)
    assert rewards["clip"].audit([exact]) == [Cut(32, 32, "")]
    assert rewards["clip"].audit([exact + " circle"]) == [Cut(32, 33, "circle")]


def test_audit_of_sentences(rewards):
    """Sentences that fit cost nothing, however many there are."""
    assert rewards["denscore"].audit(["a red circle. " * 20 + "a blue square"])[0].lost == ""
    long = "a red circle. " + " ".join(["red"] * 31) + " square. a blue square"
    (cut,) = rewards["denscore"].audit([long])
    assert cut.tokens == 35 and cut.lost == "red square."


def test_html_entities_as_in_open_clip():
    reward = given(unescape=True)
    assert reward.audit(["red &amp;amp; blue"])[0].tokens == reward.audit(["red & blue"])[0].tokens
    assert given().audit(["red &amp; blue"])[0].tokens > reward.audit(["red &amp; blue"])[0].tokens


# ---------------------------------------------------------------- what ships


def test_tiny_clip_prefers_what_is_shown():
    """The shipped scorer on held-out pictures: the own caption against that of the next picture."""
    reward = load_reward("tiny-clip")
    scenes = sample_scenes(48, np.random.default_rng(3), split="test")
    from align_cli.shapes.captions import recaption

    texts = [recaption(s, np.random.default_rng(i), long_rate=0).text for i, s in enumerate(scenes)]
    x = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 255
    own, other = reward.score(x, texts), reward.score(x, texts[1:] + texts[:1])
    assert float((own > other).float().mean()) > 0.9
    smooth = reward.score(x.requires_grad_(), texts)
    torch.testing.assert_close(smooth, own)  # 32 px pictures: nothing is resized, both paths are one
    assert reward.size == 32 and reward.limit == 32 and reward.facts()["source"] == "embedded:tiny-clip"


def test_oracle():
    reward = load_reward("shapes")
    assert not reward.differentiable and reward.headline == "shapes/all"
    prompts = eval_prompts(30, 0)
    scenes = sample_scenes(30, np.random.default_rng(0), split="test")
    x = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 255
    texts = [p.text for p in prompts]
    values = reward.metrics(x, texts)
    assert set(values) == {f"shapes/{m}" for m in METRICS}
    assert all(v.shape == (30,) and v.dtype == torch.float32 for v in values.values())
    assert values["shapes/relation"].isnan().any() and not values["shapes/all"].isnan().any()
    from align_cli.shapes.oracle import judge

    exact = judge(x, [p.spec for p in prompts])  # what the text says is what its specification says
    for key, value in exact.items():
        np.testing.assert_array_equal(values[f"shapes/{key}"].numpy(), value.astype(np.float32))
    assert torch.equal(reward.score(x, texts), values["shapes/all"])
    with pytest.raises(UserError, match="'a photo of a dog'"):
        reward.score(x[:1], ["a photo of a dog"])
    with pytest.raises(UserError, match="32 x 32 pictures.*16 x 16"):
        reward.score(pictures(1, (SIZE, SIZE)), ["a red circle"])
