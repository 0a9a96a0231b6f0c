"""Any two adapters of one family at work together: both are seen, in any order where the maths has none, and
both go without a trace. In float64, since a random model turns the last bit of a float32 into 1e-5.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations_with_replacement

import pytest
import torch
from pairs import FAMILIES, METHODS, Untouched, load_tiny, picture, predicted, stirred, together

from align_cli import registry
from align_cli.methods.base import Method
from align_cli.models.base import BaseModel

CLASSES = {name: registry.load(registry.METHODS, name) for name in METHODS}
PAIRS = list(combinations_with_replacement(METHODS, 2))
CASES = [
    # SD2.x has wide text
    pytest.param(family, *pair, marks=pytest.mark.slow if family == "sd21" else ())
    for family in FAMILIES
    for pair in PAIRS
    if all(family in CLASSES[name].families for name in pair)
]
ORDERED = {("longalign", "longalign")}
"""Pairs whose order matters: prompts are read by the one that was attached last."""
SEEN = 1e-3
"""A difference of predictions that is one of adapters, not of rounding."""


@dataclass
class Alone:
    """A method with random tensors, and what the model predicts and draws with nothing else at work."""

    method: Method
    prediction: torch.Tensor
    picture: torch.Tensor


@dataclass
class World:
    """A model, untouched and with every adapter of its family alone; two adapters of every method."""

    model: BaseModel
    prediction: torch.Tensor
    picture: torch.Tensor
    adapters: dict[str, list[Alone]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Family -> what is made at its first use."""
    made: dict[str, World] = {}

    def world(family: str) -> World:
        if family not in made:
            model = load_tiny(family, tmp_path_factory.mktemp("models"))
            for module in (model.denoiser, *model.encoders):
                torch.nn.Module.double(module)
            made[family] = World(model, predicted(model), drawn(model), {})
            for name in METHODS:
                if family in CLASSES[name].families:
                    both = [stirred(name, model, seed=seed) for seed in (1, 2)]
                    made[family].adapters[name] = [
                        Alone(method, together(model, (method, 1.0)), drawn(model, method)) for method in both
                    ]
        return made[family]

    return world


def drawn(model: BaseModel, *methods: Method) -> torch.Tensor:
    with ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.attach(model, 1.0))
        return picture(model, steps=2)


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(("family", "first", "second"), CASES)
def test_two_at_work(worlds, family, first, second):
    world = worlds(family)
    model, a, b = world.model, world.adapters[first][0], world.adapters[second][1]
    untouched = Untouched(model)
    both = together(model, (a.method, 1.0), (b.method, 1.0))
    turned = together(model, (b.method, 1.0), (a.method, 1.0))
    assert torch.isfinite(both).all()
    for other in (world.prediction, a.prediction, b.prediction):
        assert differ(both, other) > SEEN, "one of them is not seen"
    if (first, second) in ORDERED:
        assert differ(both, turned) > SEEN
    else:
        assert differ(both, turned) < 1e-5
    assert torch.equal(together(model, (a.method, 1.0), (b.method, 0.0)), a.prediction)
    assert torch.equal(together(model, (a.method, 0.0), (b.method, 1.0)), b.prediction)
    pictures = drawn(model, a.method, b.method)
    for other in (world.picture, a.picture, b.picture):
        assert not torch.equal(pictures, other)
    untouched.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_at_once_and_off_again(worlds, family):
    world = worlds(family)
    model, all_of_them = world.model, [own[0].method for own in world.adapters.values()]
    untouched = Untouched(model)
    found = together(model, *[(method, 0.5) for method in all_of_them])
    turned = together(model, *[(method, 0.5) for method in reversed(all_of_them)])
    assert differ(found, world.prediction) > SEEN and differ(found, turned) < 1e-5
    assert torch.equal(together(model, *[(method, 0.0) for method in all_of_them]), world.prediction)
    untouched.check()
    assert torch.equal(predicted(model), world.prediction)
    assert torch.equal(drawn(model), world.picture)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_whole_weights_add_up_with_lora_and_with_each_other(worlds, family):
    world = worlds(family)
    model, lora = world.model, world.adapters["comat"][0].method
    whole = [
        stirred("textcraftor", model, seed=seed, size=0.02, stage="unet", lora_rank=0) for seed in (1, 2)
    ]
    untouched = Untouched(model)
    for one, other in ((whole[0], lora), (whole[0], whole[1])):
        both = together(model, (one, 1.0), (other, 1.0))
        for alone in (world.prediction, together(model, (one, 1.0)), together(model, (other, 1.0))):
            assert differ(both, alone) > SEEN
        assert differ(both, together(model, (other, 1.0), (one, 1.0))) < 1e-5
        assert torch.equal(together(model, (one, 0.0), (other, 0.0)), world.prediction)
    untouched.check()
