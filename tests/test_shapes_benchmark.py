"""The shapes benchmark: its prompts, and the notes below judged pictures."""

from __future__ import annotations

import numpy as np
import pytest

from align_cli.errors import UserError
from align_cli.evaluation.benchmarks import ShapesBenchmark, check_pictures, measure
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings, SampleSettings
from align_cli.shapes.world import render, sample_scenes


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


def test_measure_judges_what_the_model_draws(model):
    prompts = ShapesBenchmark().prompts(4, 0)
    found = measure(model, prompts, SampleSettings(steps=2, spacing="trailing"), 0)
    assert found["all"].shape == (4,) and set(found) == set(ShapesBenchmark.metrics)


def test_large_pictures_have_no_notes(model, monkeypatch):
    monkeypatch.setattr(model, "image_size", 64)
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
