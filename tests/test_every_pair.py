"""Every method on every family: one step of the real loop, the adapter on the disk, at work, and off again;
where a method does not apply, one line that says why. docs/methods.md shows the same table.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from cli_helpers import refused
from pairs import FAMILIES, METHODS, Untouched, data, load_tiny, picture, resolved, saved

from align_cli import registry
from align_cli.adapters import attach, load_adapter, restore
from align_cli.methods.applies import NOT_APPLICABLE, why_not
from align_cli.training.loop import train

DOCS = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
CLASSES = {name: registry.load(registry.METHODS, name) for name in METHODS}
WORKS = [(name, family) for name in METHODS for family in FAMILIES if family in CLASSES[name].families]
OTHERS = [(name, family) for name in METHODS for family in FAMILIES if family not in CLASSES[name].families]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A random model of a family; every test leaves it as it was."""
    return load_tiny(request.param, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", METHODS)
def test_one_step_and_the_adapter_at_work(model, name, tmp_path):
    if model.family not in CLASSES[name].families:
        assert why_not(name, model.family), "a pair that does not work has a reason"
        return
    base = picture(model)
    untouched = Untouched(model)
    run = resolved(name, model)
    method = CLASSES[name](model, run.method_config, seed=1)
    method.check(run.train)
    groups = method.trainables()
    before = {group: [p.detach().clone() for p in own] for group, own in groups.items()}
    found = train(method, data(name, run), run.train, tmp_path / "run", config=run.to_dict())
    assert found.step == 1 and found.metrics
    assert all(math.isfinite(value) for value in found.metrics.values()), found.metrics
    for group, own in groups.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[group], own, strict=True)), group
        assert all(torch.isfinite(p).all() for p in own)
    untouched.check()

    folder = saved(tmp_path / "adapter", method)
    again = restore(load_adapter(folder), model)
    trained = method.state()
    assert again.state().keys() == trained.keys()
    assert all(torch.equal(again.state()[key], value) for key, value in trained.items())
    with attach(model, [folder]):
        assert not torch.equal(picture(model), base), "the adapter does nothing"
    untouched.check()
    with attach(model, [f"{folder}@0"]):
        assert torch.equal(picture(model), base), "scale 0 is the base"
    assert torch.equal(picture(model), base)


@pytest.mark.parametrize(("name", "family"), OTHERS)
def test_a_pair_that_does_not_apply_is_refused_in_one_line(name, family, tmp_path):
    said = refused("train", name, "--model", f"tiny-{family}", "--preset", "none", "--data", "shapes",
                   "--out", tmp_path / "run")  # fmt: skip
    assert f"{name} does not train models of the family {family}" in said
    assert why_not(name, family) in said
    assert not (tmp_path / "run").exists()


def test_reasons_are_of_pairs_that_do_not_work():
    assert sorted(NOT_APPLICABLE) == sorted(OTHERS)
    assert len(WORKS) + len(OTHERS) == len(METHODS) * len(FAMILIES)


def test_the_docs_show_this_table():
    """Cells begin with "works" or "not applicable"; every reason is there word for word."""
    text = DOCS.read_text()
    header = next(line for line in text.splitlines() if line.startswith("| method |"))
    columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
    names = {"SD1.x": "sd15", "SD2.x": "sd21", "SDXL": "sdxl", "SD3": "sd3"}
    assert [names[column] for column in columns] == list(FAMILIES)
    shown = {}
    for name in METHODS:
        row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.M)
        assert row, f"no row of {name}"
        for family, cell in zip(FAMILIES, row[1].split("|"), strict=True):
            shown[name, family] = cell.strip().startswith("works")
            assert shown[name, family] or cell.strip().startswith("not applicable")
    assert sorted(pair for pair, works in shown.items() if works) == sorted(WORKS)
    for reason in NOT_APPLICABLE.values():
        assert reason in text
