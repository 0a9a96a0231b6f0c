"""LoRA of convolutions, dropout on what it adds, merging; linear layers are in test_tuning.py too."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from align_cli.models.lora import LoraTuning, change
from align_cli.models.tuning import FullTuning, tuning_like

LAYERS = ["0", "2", "5"]
X = torch.linspace(-1, 1, 4 * 3 * 6 * 5).view(4, 3, 6, 5)


def a_module(dilation: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, (1, 3), dilation=dilation, padding="same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 3 * 3, 2),
    ).requires_grad_(False)


def a_lora(module: nn.Module, seed: int = 0, rank: int = 2, **options: object) -> LoraTuning:
    """LoRA with random values on both sides."""
    tuning = LoraTuning(module, rank=rank, alpha=3, targets=LAYERS, **options)
    rng = torch.Generator().manual_seed(seed)
    tuning.load_state({k: torch.randn(v.shape, generator=rng) for k, v in tuning.state().items()})
    return tuning


def test_lora_of_convolutions_is_that_of_peft():
    """Which knows no dilation."""
    module = a_module(dilation=1)
    tuning = a_lora(module)
    wrapped = peft.get_peft_model(
        copy.deepcopy(module), peft.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS)
    )
    peft.set_peft_model_state_dict(
        wrapped, {f"base_model.model.{key}": value for key, value in tuning.state().items()}
    )
    with tuning.attached():
        torch.testing.assert_close(module(X), wrapped(X).detach())
    for name in LAYERS:
        a, b = (tuning.weights[f"{name}.lora_{x}.weight"] for x in "AB")
        delta = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(1.5 * change(a, b), delta)


def test_convolutions_that_take_no_lora():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")):
        with pytest.raises(ValueError, match="no LoRA for 0: a convolution with groups"):
            LoraTuning(nn.Sequential(layer), rank=1, alpha=1, targets=["0"])


def test_targets_by_a_function_keep_its_order():
    tuning = LoraTuning(a_module(), rank=1, alpha=1, targets=lambda _: ["5", "0"])
    assert list(tuning.layers) == ["5", "0"]
    assert list(tuning.state()) == [f"{n}.lora_{x}.weight" for n in "50" for x in "AB"]
    with pytest.raises(ValueError, match="no convolution is called 1"):
        LoraTuning(a_module(), rank=1, alpha=1, targets=lambda _: ["0", "1"])
    with pytest.raises(ValueError, match="by the function"):
        LoraTuning(a_module(), rank=1, alpha=1, targets=lambda _: [])


def test_gauss_starts_with_a_deviation_of_one_over_the_rank():
    rng = torch.Generator().manual_seed(0)
    tuning = LoraTuning(nn.Linear(4000, 3), rank=8, alpha=8, targets=lambda _: [""], init="gauss", rng=rng)
    down, up = (p.detach() for p in tuning.parameters())
    assert float(down.std()) == pytest.approx(1 / 8, rel=0.02) and abs(float(down.mean())) < 0.002
    assert not up.any()
    with pytest.raises(ValueError, match="init must be kaiming or gauss"):
        LoraTuning(a_module(), rank=1, alpha=1, targets=["0"], init="zeros")


# ---------------------------------------------------------------- stacking and merging


@pytest.mark.parametrize("order", ["merged first", "hooks first"])
def test_a_stack_is_the_merged_sum(order):
    module, base = a_module(), a_module()
    one, two = a_lora(module, 1), a_lora(module, 2, rank=3)
    blocks = [one.merged(0.5), two.attached(0.7)]
    with ExitStack() as stack:
        for block in blocks if order == "merged first" else blocks[::-1]:
            stack.enter_context(block)
        stacked = module(X)
    with torch.no_grad():
        for name in LAYERS:
            weight = base.get_submodule(name).weight
            for tuning, scale in ((one, 0.5 * 1.5), (two, 0.7 * 1.0)):
                a, b = (tuning.weights[f"{name}.lora_{x}.weight"] for x in "AB")
                weight += scale * change(a, b)
    torch.testing.assert_close(stacked, base(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(module(X), a_module()(X))


def test_merging_is_in_float32():
    module = a_module().to(torch.bfloat16)
    tuning = a_lora(module)
    tuning.load_state({k: 1e-2 * v for k, v in tuning.state().items()})
    before = [p.data_ptr() for p in module.parameters()]
    a, b = (p.float() for p in tuning.parameters()[:2])
    with tuning.merged():
        assert module[0].weight.dtype == torch.bfloat16
        expected = a_module()[0].weight.to(torch.bfloat16).float() + 1.5 * change(a, b)
        assert torch.equal(module[0].weight, expected.to(torch.bfloat16))
    assert [p.data_ptr() for p in module.parameters()] == before
    with tuning.merged(0.0):
        assert [p.data_ptr() for p in module.parameters()] == before


def test_merged_lora_and_all_weights_add_up_in_any_order():
    module = a_module()
    lora, full = a_lora(module), FullTuning(module)
    with torch.no_grad():
        for p in full.parameters():
            p.mul_(1.5)
    found = []
    for blocks in ((lora.merged, full.attached), (full.attached, lora.merged)):
        with blocks[0](), blocks[1]():
            found.append([p.detach().clone() for p in module.parameters()])
    own = dict(a_module().named_parameters())
    a, b = lora.parameters()[:2]
    torch.testing.assert_close(found[0][0], 1.5 * own["0.weight"] + 1.5 * change(a, b).detach())
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    assert all(torch.equal(p, own[name]) for name, p in module.named_parameters())


def test_a_state_of_convolutions_tells_what_it_was_trained_as():
    tuning = a_lora(a_module())
    state = tuning.state_for(1.0)
    found = tuning_like(a_module(), state)
    assert isinstance(found, LoraTuning) and list(found.layers) == LAYERS
    found.load_state(state)
    with found.attached(), tuning.attached():
        torch.testing.assert_close(found.base(X), tuning.base(X))


# ---------------------------------------------------------------- dropout


def rng(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def added(tuning: LoraTuning, x: torch.Tensor, **options: int) -> torch.Tensor:
    """What the first layer adds, with dropout."""
    layer = tuning.base[0]
    with tuning.attached(), tuning.dropping(rng(), 0.25, **options):
        return (layer(x) - a_module()[0](x)).detach()


def test_dropout_is_of_what_is_added():
    module = a_module()
    tuning = a_lora(module)
    x = torch.linspace(-1, 1, 200 * 3 * 36).view(200, 3, 6, 6)
    with tuning.attached():
        whole = module[0](x) - a_module()[0](x)
    found = added(tuning, x)
    kept = (found / whole).round(decimals=3)[whole.abs() > 1e-2]
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1.333]))
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.015)
    with tuning.attached():  # and none without it
        assert torch.equal(module[0](x) - a_module()[0](x), whole)


def test_dropout_comes_from_the_generator_alone():
    module = a_module()
    tuning = a_lora(module)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = added(tuning, X)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(added(tuning, X), one)
    given = rng()
    with tuning.attached(), tuning.dropping(given, 0.25):
        first, second = module(X), module(X)
    assert not torch.equal(first, second)
    assert not torch.equal(given.get_state(), rng().get_state())
    with tuning.dropping(given, 0.0), pytest.raises(ValueError, match="dropout must be >= 0 and < 1"):  # noqa: SIM117
        with tuning.dropping(given, 1.0):
            pass


def test_dropout_does_not_depend_on_the_number_of_processes():
    """Two parts (the halves of guidance) of four rows, by one process and by two."""
    tuning = a_lora(a_module())
    x = torch.cat([X, X + 1])
    whole = added(tuning, x, rows=4)
    for rank in range(2):
        mine = x.view(2, 2, 2, 3, 6, 5)[:, rank].flatten(0, 1)
        expected = whole.view(2, 2, 2, *whole.shape[1:])[:, rank].flatten(0, 1)
        assert torch.equal(added(tuning, mine, rows=2, rank=rank, world_size=2), expected)


def test_checkpointing_replays_the_masks():
    module = a_module()
    tuning = a_lora(module)

    def gradients(recompute: bool) -> list[torch.Tensor]:
        for p in tuning.parameters():
            p.grad = None
        with tuning.attached(), tuning.dropping(rng(), 0.4):
            x = X.clone().requires_grad_()
            for _ in range(2):
                y = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
                x = x + y.mean()
            x.square().sum().backward()
        return [p.grad for p in tuning.parameters()]

    for one, two in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, two) and one.any()
