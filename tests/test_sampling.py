"""Drawing pictures with a tiny random model of the real classes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from align_cli.errors import UserError
from align_cli.models.loading import load_model
from align_cli.sampling import check_side, own_settings, picture_seeds, sample
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


# ---------------------------------------------------------------- all families

EULER = dataclasses.replace(QUICK, sampler="euler")
FAMILIES = {"tiny_sdxl_folder": QUICK, "tiny_sd3_folder": EULER, "tiny_v_folder": QUICK}


@pytest.mark.parametrize("folder", FAMILIES)
def test_batch_size_changes_pictures_of_no_family(folder, request):
    model = load_model(ModelSettings(name=str(request.getfixturevalue(folder)), device="cpu"))
    settings = FAMILIES[folder]
    together = sample(model, PROMPTS, settings, SEEDS)
    assert together.shape == (5, 3, 32, 32)
    for size in (1, 2):
        apart = sample(model, PROMPTS, dataclasses.replace(settings, batch_size=size), SEEDS)
        torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
        assert (to_bytes(apart) != to_bytes(together)).float().mean() < 0.001
    assert torch.equal(sample(model, PROMPTS, settings, SEEDS), together)
    assert not torch.allclose(sample(model, PROMPTS[:1], settings, [99])[0], together[0], atol=1e-2)
    assert not torch.allclose(sample(model, PROMPTS[1:2], settings, SEEDS[:1])[0], together[0], atol=1e-2)


@pytest.fixture(scope="module")
def flow_model(tiny_sd3_folder):
    return load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu"))


def test_the_models_own_sampler(model, flow_model, tiny_v_folder):
    given = SampleSettings(sampler="ddpm", spacing="linspace")
    both = {"sampler", "spacing"}
    assert own_settings(model, given, set()) == given
    assert own_settings(flow_model, given, both) == dataclasses.replace(given, sampler="euler")
    velocity = load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))
    for one, spacing in ((model, "leading"), (velocity, "trailing")):
        found = own_settings(one, given, both)
        assert (found.sampler, found.spacing) == ("ddim", spacing)
        assert own_settings(one, given, {"spacing"}).sampler == "ddpm"


def test_a_sampler_of_another_kind_is_refused(model, flow_model):
    with pytest.raises(UserError, match="sampler euler is for flow-matching models; .* draws with ddim or"):
        sample(model, PROMPTS[:1], EULER, [1])
    for name in ("ddim", "ddpm"):
        wrong = dataclasses.replace(QUICK, sampler=name)
        with pytest.raises(
            UserError, match=f"sampler {name} is not for flow-matching models; .* draws with euler"
        ):
            sample(flow_model, PROMPTS[:1], wrong, [1])


def test_size_must_fit_the_transformer(flow_model):
    with pytest.raises(UserError, match=r"image_size must be a multiple of 8 pixels for .*, got 36; try 32"):
        sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=36), [1])
    with pytest.raises(UserError, match=r"image_size must be at most 128 pixels for .*, got 136"):
        sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=136), [1])
    picture = sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=128), [1])
    assert picture.shape == (1, 3, 128, 128)
    with pytest.raises(UserError, match="--image: the width must be a multiple"):
        check_side(flow_model, 20, "--image: the width")
