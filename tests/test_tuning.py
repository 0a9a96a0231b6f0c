"""Ways to train a module: all weights or LoRA; put to work, stacked, taken off without a trace."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from align_cli.models.lora import ATTENTION, LoraTuning, lora_layers
from align_cli.models.tuning import FullTuning, tuning_like


def a_module(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)


def moved(tuning, seed: int):
    """The tuning with other numbers."""
    rng = torch.Generator().manual_seed(seed)
    tuning.load_state({k: v + torch.randn(v.shape, generator=rng) for k, v in tuning.state().items()})
    return tuning


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_full_weights_are_exactly_the_trained_ones_at_scale_one():
    module = a_module()
    tuning = moved(FullTuning(module), 1)
    before, data = module(X), [p.data_ptr() for p in module.parameters()]
    with tuning.attached():
        assert torch.equal(module(X), tuning.module(X))
        assert not torch.equal(module(X), before)
    assert torch.equal(module(X), before)
    assert [p.data_ptr() for p in module.parameters()] == data


def test_full_weights_move_in_proportion():
    module = a_module()
    tuning = moved(FullTuning(module), 1)
    base, trained = module[0].weight.clone(), tuning.module[0].weight.detach()
    with tuning.attached(0.25):
        torch.testing.assert_close(module[0].weight, base + 0.25 * (trained - base))
    with tuning.attached(0.0):
        assert torch.equal(module[0].weight, base)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stack_does_not_depend_on_its_order(kind):
    module = a_module()

    def make(seed: int):
        tuning = (
            FullTuning(module) if kind == "full" else LoraTuning(module, rank=2, alpha=4, targets=["0", "2"])
        )
        return moved(tuning, seed)

    one, two = make(1), make(2)
    with one.attached(0.5), two.attached(1.0):
        first = module(X)
    with two.attached(1.0), one.attached(0.5):
        second = module(X)
    torch.testing.assert_close(first, second)
    base = a_module()
    if kind == "full":
        weight = base[0].weight
        change = 0.5 * (one.module[0].weight - weight) + two.module[0].weight - weight
        with one.attached(0.5), two.attached(1.0):
            torch.testing.assert_close(module[0].weight, weight + change)
    assert torch.equal(module(X), base(X))


def test_full_weights_of_a_half_precision_module():
    module = a_module().to(torch.bfloat16)
    tuning = moved(FullTuning(module), 1)
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}
    with tuning.attached(0.5):
        assert module[0].weight.dtype == torch.bfloat16


def test_lora_starts_at_the_module_itself_and_is_the_sum():
    module = a_module()
    tuning = LoraTuning(module, rank=2, alpha=1, targets=["2"])
    with tuning.attached():
        assert torch.equal(module(X), a_module()(X))
    moved(tuning, 3)
    a, b = (tuning.weights[f"2.lora_{x}.weight"] for x in "AB")
    hidden = module[1](module[0](X))
    with tuning.attached(0.5):
        torch.testing.assert_close(module(X), _plain(hidden) + 0.25 * hidden @ a.T @ b.T)


def _plain(hidden: torch.Tensor) -> torch.Tensor:
    return a_module()[2](hidden)


def test_lora_is_that_of_peft():
    module = a_module()
    wrapped = peft.get_peft_model(
        copy.deepcopy(module), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    )
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng))
    state = {
        name.removeprefix("base_model.model."): value
        for name, value in peft.get_peft_model_state_dict(wrapped).items()
    }
    tuning = LoraTuning(module, rank=2, alpha=6, targets=["0", "2"])
    tuning.load_state(state)
    with tuning.attached():
        torch.testing.assert_close(module(X), wrapped(X).detach())


def test_lora_learns_and_the_module_does_not():
    module = a_module()
    tuning = LoraTuning(module, rank=2, alpha=2, targets=["0", "2"])
    with tuning.attached():
        module(X).square().sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_lora_is_the_same_on_every_machine():
    rngs = [torch.Generator().manual_seed(5) for _ in range(2)]
    one, two = (LoraTuning(a_module(), rank=2, alpha=2, targets=["0"], rng=rng) for rng in rngs)
    assert torch.equal(one.weights["0.lora_A.weight"], two.weights["0.lora_A.weight"])


def test_attention_layers_of_all_kinds_are_found(tiny_models):
    for model in tiny_models.values():
        for module in (model.denoiser, *model.encoders[:2]):
            names = {name.rpartition(".")[2] for name in lora_layers(module, ATTENTION)}
            assert {"q_proj", "k_proj", "v_proj"} <= names or {"to_q", "to_k", "to_v"} <= names


def test_no_such_layer():
    with pytest.raises(ValueError, match="no linear layer and no convolution is called to_q"):
        LoraTuning(a_module(), rank=1, alpha=1, targets=["to_q"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_states_that_do_not_fit_change_nothing(kind):
    module = a_module()
    tuning = FullTuning(module) if kind == "full" else LoraTuning(module, rank=2, alpha=2, targets=["0"])
    before = tuning.state()
    key = next(iter(before))
    for wrong, words in (
        ({k: v for k, v in before.items() if k != key}, f"missing {key}"),
        ({**before, "more": torch.zeros(1)}, "unused more"),
        ({**before, key: torch.zeros(7)}, rf"{key} has shape \[7\], expected \["),
    ):
        with pytest.raises(ValueError, match=words):
            tuning.load_state(wrong)
    assert all(torch.equal(before[k], v) for k, v in tuning.state().items())


def test_a_state_tells_what_it_was_trained_as():
    module = a_module()
    assert isinstance(tuning_like(module, FullTuning(module).state()), FullTuning)
    lora = LoraTuning(module, rank=2, alpha=2, targets=["2"])
    found = tuning_like(module, lora.state())
    assert isinstance(found, LoraTuning) and list(found.layers) == ["2"] and found.factor == 1
    found.load_state(lora.state())
