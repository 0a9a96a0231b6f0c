"""Drawing pictures with a tiny random model of the real classes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from model_helpers import load, pipeline

from align_cli.errors import UserError
from align_cli.models.loading import load_model
from align_cli.registry import WEIGHTS
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


@pytest.mark.slow
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


LCM = SampleSettings(sampler="lcm", spacing="lcm", steps=4, guidance=1.0, batch_size=2)
UNIPC = SampleSettings(sampler="unipc", spacing="linspace", steps=25, guidance=4.0, batch_size=2)


class PlainLCM(LCMScheduler):
    """As LongAlign's sample.py forces it."""

    def get_scalings_for_boundary_condition_discrete(self, timestep):
        return 0, 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "scheduler", "guidance"), [(LCM, PlainLCM, 0.0), (UNIPC, UniPCMultistepScheduler, 4.0)]
)
@pytest.mark.parametrize("name", ["tiny-sd15", "tiny_v_folder"])
def test_lcm_and_unipc_as_the_pipelines_of_diffusers(name, settings, scheduler, guidance, request):
    folder = request.getfixturevalue(name) if name.endswith("folder") else WEIGHTS / name
    model, pipe = load(folder), pipeline(StableDiffusionPipeline, folder, torch_dtype=torch.float32)
    known = {k: v for k, v in pipe.scheduler.config.items() if k != "timestep_spacing"}
    pipe.scheduler = scheduler.from_config(known)
    if settings.sampler == "lcm":
        assert not pipe.scheduler.config.get("clip_sample")
    seeds, shape = [3, 4], (model.latent_channels, 32 // model.vae_factor, 32 // model.vae_factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start = torch.stack([torch.randn(shape, generator=g) for g in generators])
    text = {"prompt_embeds": model.encode_text(PROMPTS[:2]).tokens}
    text["negative_prompt_embeds"] = model.encode_text([""] * 2).tokens
    options = {"num_inference_steps": settings.steps, "guidance_scale": guidance, "output_type": "pt"}
    expected = pipe(**text, latents=start, generator=generators, height=32, width=32, **options).images
    assert len(pipe.scheduler.timesteps) == settings.steps
    found = sample(model, PROMPTS[:2], settings, seeds)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LCM, UNIPC])
def test_batch_size_changes_no_picture_of_lcm_and_unipc(model, settings):
    together = sample(model, PROMPTS, dataclasses.replace(settings, batch_size=5), SEEDS)
    torch.testing.assert_close(sample(model, PROMPTS, settings, SEEDS), together, atol=1e-4, rtol=0)


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
        for name, spacing in (("lcm", "lcm"), ("unipc", "linspace")):
            chosen = dataclasses.replace(given, sampler=name)
            assert own_settings(one, chosen, {"spacing"}).spacing == spacing
            assert own_settings(one, chosen, set()).spacing == "linspace"


def test_a_sampler_of_another_kind_is_refused(model, flow_model):
    with pytest.raises(UserError, match="sampler euler is for flow-matching models; .* with ddim, ddpm"):
        sample(model, PROMPTS[:1], EULER, [1])
    for name in ("ddim", "ddpm", "lcm", "unipc"):
        wrong = dataclasses.replace(QUICK, sampler=name)
        with pytest.raises(
            UserError, match=f"sampler {name} is not for flow-matching models; .* draws with euler"
        ):
            sample(flow_model, PROMPTS[:1], wrong, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim", "spacing": "lcm"}, "spacing lcm is for sampler lcm alone, got sampler ddim"),
        ({"sampler": "unipc", "spacing": "lead"}, "spacing lead is not for sampler unipc"),
        ({"sampler": "lcm", "spacing": "lcm", "steps": 51}, "at most 50 with spacing lcm, got 51"),
        ({"sampler": "heun"}, "sampler must be one of ddim, ddpm, unipc, lcm, euler, got 'heun'"),
    ],
)
def test_samplers_and_spacings_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        SampleSettings(**options)


def test_numbers_of_steps_that_a_model_has_not():
    for options, total, message in (
        ({"sampler": "unipc", "spacing": "linspace", "steps": 1000}, 1000, "at most 999 for m, got 1000"),
        ({"sampler": "lcm", "spacing": "lcm", "steps": 4}, 40, "spacing lcm needs 50 timesteps, m has 40"),
    ):
        with pytest.raises(UserError, match=message):
            SampleSettings(**options).check_model("m", 1, total)


def test_size_must_fit_the_transformer(flow_model):
    with pytest.raises(UserError, match=r"image_size must be a multiple of 8 pixels for .*, got 36; try 32"):
        sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=36), [1])
    with pytest.raises(UserError, match=r"image_size must be at most 128 pixels for .*, got 136"):
        sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=136), [1])
    picture = sample(flow_model, PROMPTS[:1], dataclasses.replace(EULER, image_size=128), [1])
    assert picture.shape == (1, 3, 128, 128)
    with pytest.raises(UserError, match="--image: the width must be a multiple"):
        check_side(flow_model, 20, "--image: the width")
