"""The paired evaluation on a tiny random model: same prompts, same noise, the model untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from align_cli.errors import UserError
from align_cli.evaluation.benchmarks import ShapesBenchmark, check_pictures
from align_cli.evaluation.paired import evaluate_alignment, evaluate_base, measure, peak_memory
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings, SampleSettings
from align_cli.shapes.world import render, sample_scenes

QUICK = SampleSettings(steps=2, guidance=2.0, batch_size=12, spacing="trailing")


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


class Shift:
    """A method whose trained state is one number, added to the last bias of the denoiser."""

    name: ClassVar[str] = "shift"

    def __init__(self, by: float) -> None:
        self.by = by
        self.active = 0

    @contextmanager
    def attach(self, model, scale: float = 1.0) -> Iterator[None]:
        bias = model.denoiser.conv_out.bias
        before = bias.detach().clone()
        bias.data += self.by * scale
        self.active += 1
        try:
            yield
        finally:
            bias.data.copy_(before)
            self.active -= 1


def test_nothing_attached_changes_nothing(model):
    prompts = ShapesBenchmark().prompts(12, 0)
    result = evaluate_alignment(model, Shift(0.0), prompts, QUICK, seed=1)
    for row in (*result.rows.values(), *(r for rows in result.kinds.values() for r in rows.values())):
        assert row.n == 0 or (row.difference, row.up, row.down) == (0.0, 0, 0)
    assert result.rows["all"].verdict == "no significant change"
    assert result.facts.adapters == ("shift",)
    for example in result.examples:
        assert np.array_equal(example.base, example.aligned)


def test_the_model_is_untouched_and_the_change_is_seen(model):
    prompts = ShapesBenchmark().prompts(12, 0)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    method, calls = Shift(3.0), []
    result = evaluate_alignment(model, method, prompts, QUICK, 1, lambda *call: calls.append(call))
    assert method.active == 0
    assert all(torch.equal(before[k], v) for k, v in model.denoiser.state_dict().items())
    assert any(not np.array_equal(e.base, e.aligned) for e in result.examples)
    assert calls[0] == ("base", 12, 24)
    assert calls[-1] == ("aligned", 24, 24)
    assert [result.rows["all"].n, result.rows["object"].n] == [12, 12]
    assert sum(rows["all"].n for rows in result.kinds.values()) == 12
    assert set(result.facts.seconds) == {"base", "aligned"}
    assert result.facts.peak_memory_bytes > 50 * 2**20
    json.dumps(result.to_json(), allow_nan=False)


def test_base_numbers_are_the_same_alone_and_paired(model, tmp_path):
    prompts = ShapesBenchmark().prompts(12, 0)
    alone = evaluate_base(model, prompts, QUICK, seed=1)
    both = evaluate_alignment(model, Shift(1.0), prompts, QUICK, seed=1)
    for name, row in alone.rows.items():
        np.testing.assert_equal(row.mean, both.rows[name].base)
    assert alone.facts.kinds == {"pair": 8, "triple": 2, "long": 2}
    alone.save_picture(tmp_path / "a.png")
    both.save_picture(tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").width < Image.open(tmp_path / "b.png").width
    again = measure(model, prompts, QUICK, 2)
    assert not np.array_equal(again.pictures, measure(model, prompts, QUICK, 1).pictures)


def test_a_method_that_does_not_fit_fails_before_drawing(model):
    class Misfit(Shift):
        def attach(self, model, scale: float = 1.0):
            raise UserError("adapter is for family sd3")

    calls: list[object] = []
    with pytest.raises(UserError, match="sd3"):
        evaluate_alignment(model, Misfit(1.0), ShapesBenchmark().prompts(4, 0), QUICK, 0, calls.append)
    assert calls == []


def test_large_pictures_cannot_be_judged(model, monkeypatch):
    monkeypatch.setattr(model, "image_size", 64)
    with pytest.raises(UserError, match="32 px"):
        evaluate_base(model, ShapesBenchmark().prompts(4, 0), QUICK)
    assert check_pictures(model, [], []) == []


def test_notes_for_prompts_of_the_grammar(model):
    rng = np.random.default_rng(0)
    scene = sample_scenes(1, rng, kinds=("single",))[0]
    thing = scene.things[0]
    picture = render([scene])[0]
    texts = [f"a {thing.color} {thing.shape}", f"two {thing.color} {thing.shape}s", "a castle at dawn"]
    notes = check_pictures(model, [picture] * 3, texts)
    assert [note.good for note in notes] == [True, False, None]
    assert notes[1].text.startswith("wrong: ")
    assert "count" in notes[1].text
    assert notes[2].text == ""
    assert check_pictures(model, [picture], ["a castle at dawn"]) == []


def test_bad_arguments():
    with pytest.raises(UserError, match="split"):
        ShapesBenchmark().prompts(4, 0, split="tset")
    with pytest.raises(UserError, match="at least one prompt"):
        ShapesBenchmark().prompts(0, 0)


def test_peak_memory_is_in_bytes():
    process, gpu = peak_memory()
    assert 50 * 2**20 < process < 2**40
    assert gpu >= 0
