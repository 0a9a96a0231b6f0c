"""Drawing pictures with a tiny random model of the real classes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from align_cli.errors import UserError
from align_cli.models.loading import load_model
from align_cli.sampling import picture_seeds, sample
from align_cli.settings import ModelSettings, SampleSettings

PROMPTS = ["a red circle", "a blue square and a green circle", "two red circles", "a yellow triangle", ""]
SEEDS = [3, 4, 5, 6, 7]
QUICK = SampleSettings(steps=3, guidance=3.0, batch_size=5)


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    "settings", [QUICK, dataclasses.replace(QUICK, eta=1.0), dataclasses.replace(QUICK, sampler="ddpm")]
)
def test_batch_size_does_not_change_pictures(model, settings):
    together = sample(model, PROMPTS, settings, SEEDS)
    assert together.shape == (5, 3, model.image_size, model.image_size)
    assert together.dtype == torch.float32
    assert together.min() >= 0
    assert together.max() <= 1
    for size in (1, 2):
        apart = sample(model, PROMPTS, dataclasses.replace(settings, batch_size=size), SEEDS)
        torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
        assert (to_bytes(apart) != to_bytes(together)).float().mean() < 0.001
    assert torch.equal(sample(model, PROMPTS, settings, SEEDS), together)


def test_seed_and_prompt_choose_the_picture(model):
    base = sample(model, PROMPTS[:1] * 2, QUICK, [1, 2])
    assert not torch.allclose(base[0], base[1], atol=1e-2)
    other = sample(model, PROMPTS[1:2], QUICK, [1])
    assert not torch.equal(base[0], other[0])
    swapped = sample(model, PROMPTS[:1] * 2, QUICK, [2, 1])
    torch.testing.assert_close(swapped.flip(0), base, atol=1e-4, rtol=0)


def test_progress_counts_pictures_times_steps(model):
    calls: list[tuple[int, int]] = []
    sample(
        model,
        PROMPTS[:3],
        dataclasses.replace(QUICK, batch_size=2),
        [1, 2, 3],
        lambda d, t: calls.append((d, t)),
    )
    assert calls == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_size_must_fit_the_autoencoder(model):
    wrong = model.vae_factor * 4 + 1
    with pytest.raises(UserError, match=f"multiple of {model.vae_factor}"):
        sample(model, PROMPTS[:1], dataclasses.replace(QUICK, image_size=wrong), [1])
    side = model.vae_factor * 16
    assert sample(model, PROMPTS[:1], dataclasses.replace(QUICK, image_size=side), [1]).shape[-1] == side
    with pytest.raises(ValueError, match="seeds"):
        sample(model, PROMPTS[:1], QUICK, [1, 2])
    with pytest.raises(ValueError, match="no prompts"):
        sample(model, [], QUICK, [])


def test_picture_seeds_are_stable_and_do_not_overlap():
    assert picture_seeds(0, 4) == picture_seeds(0, 8)[:4]
    assert len(set(picture_seeds(0, 500)) & set(picture_seeds(1, 500))) == 0
    assert len(set(picture_seeds(0, 500))) == 500
