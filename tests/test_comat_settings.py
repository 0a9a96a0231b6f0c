"""CoMat: words and pictures without nouns, settings, bad input, the artefact."""

from __future__ import annotations

import math

import pytest
import torch
from comat_helpers import PROMPTS, gradient, make, run, stir
from model_helpers import field

from align_cli.errors import UserError
from align_cli.grounding.entities import Entity
from align_cli.methods.comat.concentration import Words
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.method import CoMat
from align_cli.settings import TrainSettings

# ---------------------------------------------------------------- words


def test_words_of_a_batch():
    told = [
        [Entity("circle", (2, 3), ("red", "circle")), Entity("square", (7, 8), ("blue", "square"))],
        [],
        [Entity("dog", (4,), ("dog",))],
    ]
    words = Words.of(told, torch.device("cpu"))
    assert words.positions.tolist() == [[2, 3, 7, 8], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert [own.int().tolist() for own in words.own] == [[[1, 1, 0, 0], [0, 0, 1, 1]], [], [[1, 0, 0, 0]]]
    assert words.nouns == [["circle", "square"], [], ["dog"]] and words.count == 3


class Nothing:
    def entities(self, prompt):
        return []


def test_prompts_without_nouns(sd15):
    """The other losses go on; those of attention are none, which counts in their means."""
    values = run(make(sd15, reader=Nothing()))
    assert values["loss/token"] == 0 == values["words/nouns"] and math.isfinite(values["loss"])


def test_prompts_without_nouns_and_nothing_else_to_learn(sd15):
    method = make(sd15, reader=Nothing(), rewards={}, fidelity_weight=0)
    values = run(method)
    assert values["loss"] == 0 and float(gradient(method, "generator").abs().max()) == 0


class LeftOut:
    def masks(self, images, nouns):
        return [None] * len(images)


def test_pictures_of_which_nothing_can_be_said(sd15):
    values = run(make(sd15, masker=LeftOut()))
    assert values["loss/token"] == 0 and values["words/found"] == 0


# ---------------------------------------------------------------- settings


def test_a_rank_beyond_the_layers(sd15):
    with pytest.raises(UserError, match=r"comat.lora_rank must be at most \d+"):
        CoMat(sd15, CoMatConfig(lora_rank=4096))
    with pytest.raises(UserError, match=r"comat.discriminator_rank must be at most \d+"):
        make(sd15, discriminator_rank=4096)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 4, "grad_steps": 5}, "comat.grad_steps must be at most comat.steps"),
        ({"real": "imagined"}, "comat.real must be one of stored, drawn"),
        ({"attention_layers": ("up16",)}, "mid_8 or up_16"),
        ({"rewards": {}, "fidelity_weight": 0, "attention_steps": 0}, "nothing is asked of the pictures"),
        ({"rewards": {"shapes": 1.0}}, "without a gradient"),
        ({"norm_grad": True}, "comat.decode_chunk=0"),
        ({"reward_weights": {"clip": "x"}}, "comat.reward_weights names clip"),
        ({"box_threshold": 1.5}, "comat.box_threshold must be >= 0 and < 1"),
        ({"guidance": -1.0}, "comat.guidance must be >= 0"),
    ],
)
def test_bad_settings(options, said):
    with pytest.raises(UserError, match=said):
        CoMatConfig(**options)


def test_the_discriminator_has_its_own_optimiser(sd15):
    options = make(sd15, lr_discriminator=3e-5).group_options()
    assert options == {"discriminator": {"adam_beta1": 0.0, "max_grad_norm": 1.0, "lr": 3e-5}}
    assert make(sd15, fidelity_weight=0).group_options() == {}


def test_settings_without_effect_are_told(sd15):
    config = CoMatConfig(
        lora_rank=2, rewards={}, real="drawn", attention_steps=0, masker="shapes", crop=False, steps=5
    )
    method = CoMat(sd15, config)
    with pytest.warns(UserWarning, match="no effect") as told:
        method.check(TrainSettings())
    texts = " ".join(str(one.message) for one in told)
    assert "comat.masker" in texts and "comat.crop" in texts


def test_more_steps_than_timesteps(sd15):
    method = CoMat(sd15, CoMatConfig(lora_rank=2, steps=1001, fidelity_weight=0, attention_steps=0))
    with pytest.raises(UserError, match=r"comat.steps must be at most 1000 .*, got 1001"):
        method.check(TrainSettings())


def test_the_dtype_of_the_rewards_is_also_that_of_the_masks():
    """So it has an effect without rewards, too."""
    plain = {"rewards": {}, "reward_dtype": "bfloat16"}
    assert "comat.reward_dtype" not in CoMatConfig(**plain).idle()
    assert "comat.reward_dtype" in CoMatConfig(**plain, attention_steps=0).idle()


def test_another_discriminator_saves_memory_as_the_model_does(sd15, tiny_sd15_folder):
    config = CoMatConfig(lora_rank=2, discriminator=str(tiny_sd15_folder), rewards={}, attention_steps=0)
    for saving in (True, False):
        method = CoMat(sd15, config)
        method.check(TrainSettings(gradient_checkpointing=saving))
        assert method.discriminator.model is not sd15
        assert method.discriminator.model.denoiser.is_gradient_checkpointing == saving


# ---------------------------------------------------------------- the artefact


def test_the_state_holds_the_lora_alone(sd15):
    method = stir(make(sd15))
    state = method.state()
    assert all(key.startswith("unet.") for key in state)
    other = make(sd15, fidelity_weight=0)
    other.load_state(state)
    assert all(torch.equal(x, other.state()[key]) for key, x in state.items())
    with pytest.raises(ValueError, match="unused text"):
        other.load_state({**state, "text.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing"):
        other.load_state(dict(list(state.items())[1:]))


def test_attach_moves_the_unet_and_takes_it_back(sd15):
    method = stir(make(sd15))
    z, t, text = field(0, 3, 4, 8, 8), torch.tensor(300), sd15.encode_text(PROMPTS)
    before = sd15.predict(z, t, text)
    with method.attach(sd15):
        assert not torch.allclose(sd15.predict(z, t, text), before, atol=1e-4)
    with method.attach(sd15, 0.0):
        assert torch.equal(sd15.predict(z, t, text), before)
    assert torch.equal(sd15.predict(z, t, text), before)
