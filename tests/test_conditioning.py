"""What the denoiser is told at every step, with adapters on the text encoders at work."""

from __future__ import annotations

import pytest
import torch
from model_helpers import PROMPTS, load

from align_cli import sampling
from align_cli.errors import UserError
from align_cli.models.base import TextCond
from align_cli.models.conditioning import StepText, mix
from align_cli.settings import SampleSettings


class Change:
    """The model's own embedding plus a number, from step `first` on."""

    def __init__(self, model, plus: float, first: int = 0, scale: float = 1.0) -> None:
        self.model, self.plus, self.first, self.scale = model, plus, first, scale
        self.calls = 0

    def first_step(self, steps: int) -> int:
        return self.first

    def encode(self, prompts):
        self.calls += 1
        return TextCond(self.model.encode_text(prompts).tokens + self.plus)

    def uncond(self, batch):
        return TextCond(self.model.uncond(batch).tokens - self.plus)


@pytest.fixture
def model(tiny_sd15_folder):
    return load(tiny_sd15_folder)


def test_mix_by_hand():
    own = TextCond(torch.tensor([[[1.0]]]), torch.tensor([[10.0]]))
    one = TextCond(torch.tensor([[[3.0]]]), torch.tensor([[20.0]]))
    two = TextCond(torch.tensor([[[5.0]]]), torch.tensor([[30.0]]))
    found = mix(own, [(0.5, one), (0.25, two)])  # .25 own + .5 one + .25 two
    assert found.tokens.item() == 0.25 * 1 + 0.5 * 3 + 0.25 * 5
    assert found.pooled.item() == 0.25 * 10 + 0.5 * 20 + 0.25 * 30
    assert mix(own, [(1.0, one)]) is one
    assert mix(own, []).tokens is own.tokens


def test_changes_begin_at_their_steps(model):
    first, second = Change(model, 1.0, first=2), Change(model, 10.0, first=3, scale=0.5)
    model.text_changes.extend([first, second])
    text = StepText(model, PROMPTS, 5)
    own, empty = model.encode_text(PROMPTS).tokens, model.uncond(2).tokens
    for i, plus in enumerate([0, 0, 1, 6, 6]):
        torch.testing.assert_close(text.cond(i).tokens, own + plus)
        torch.testing.assert_close(text.uncond(i).tokens, empty - plus)
    assert first.calls == second.calls == 1
    early = StepText(model, PROMPTS, 5, from_step=0)
    torch.testing.assert_close(early.cond(0).tokens, own + 6)


def test_scale_zero_is_the_base_and_costs_nothing(model):
    change = Change(model, 1.0, scale=0.0)
    model.text_changes.append(change)
    text = StepText(model, PROMPTS, 5)
    assert torch.equal(text.cond(4).tokens, model.encode_text(PROMPTS).tokens)
    assert change.calls == 0


def test_pictures_follow_the_step(model):
    def draw(**options) -> torch.Tensor:
        return sampling.sample(model, PROMPTS, SampleSettings(steps=4, **options), [1, 2])

    base = draw()
    model.text_changes.append(Change(model, 3.0, first=4))
    assert torch.equal(draw(), base)
    late, always = draw(from_step=3), draw(from_step=0)
    assert not torch.equal(late, base) and not torch.equal(late, always)


def test_a_step_beyond_the_path_is_refused():
    with pytest.raises(UserError, match=r"sample.from_step must be between 0 and 3 \(sample.steps - 1\)"):
        SampleSettings(steps=4, from_step=4)
