"""Adapters in the pipelines of diffusers: what `pipe(...)` draws is what `t2ialign sample` draws.

Latents agree to 1e-5 of the largest: the same numbers go through the same modules, but the unconditional text
is encoded in another batch, and diffusers takes its steps in another order of sums, UniPC's in float32. The
first step of a random model multiplies such a rounding by up to 15, 1 / sqrt(abar_999).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pairs
import pytest
import torch
from cli_helpers import ok
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from pipeline_files import CASES, save_any

import align_cli
from align_cli import sampling
from align_cli.adapters import attach
from align_cli.errors import UserError
from align_cli.exporting import export
from align_cli.methods.comat.method import CoMat
from align_cli.models.base import BaseModel
from align_cli.models.loading import load_model
from align_cli.pipelines import installed
from align_cli.settings import ModelSettings, SampleSettings

CLASSES = {
    "sd15": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
}
PROMPTS = ["a red circle left of a blue square", "two green triangles. One is large."]
SEEDS = [3, 2**31]
MANY = {"sd15": {}, "sd21": {}, "sdxl": {}, "sd3": {"sampler": "euler"}}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    most = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * max(most, 1), rtol=0)


def ours(model, specs, prompts=PROMPTS, seeds=SEEDS, **settings) -> torch.Tensor:
    """Latents of `t2ialign sample`."""
    drawing = SampleSettings(**{"steps": 4, "guidance": 3.0, **MANY[model.family], **settings})
    with attach(model, specs):
        return torch.cat(list(sampling.draw_latents(model, prompts, drawing, seeds)))


def loaded(model, specs, **options):
    options = {"steps": 4, "guidance": 3.0, "device": "cpu", **MANY[model.family], **options}
    pipe = align_cli.load_pipeline(model.model_id, specs, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, prompts=PROMPTS, seeds=SEEDS, **call) -> torch.Tensor:
    """Latents of the pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {**align_cli.call_options(pipe), "generator": generators, "output_type": "latent", **call}
    return pipe(prompts, **options).images


@pytest.fixture
def saved(tiny_models, tiny_sd3_folder, tmp_path):
    """Saves an adapter of a method for a family; gives the model and the spec."""

    def save(method: str, family: str, **options):
        model = tiny_models[family]
        folder = tmp_path / f"{method}-{family}-{len(list(tmp_path.iterdir()))}"
        return model, save_any(folder, method, model, tiny_sd3_folder, **options)

    return save


@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize(("method", "family"), CASES)
def test_draws_what_sample_draws(saved, method, family):
    options = {"test_grad_steps": 2} if method == "textcraftor" else {}
    model, spec = saved(method, family, **options)
    expected, plain = ours(model, [spec]), ours(model, [])
    assert (expected - plain).abs().max() > 0.01
    pipe = loaded(model, [spec])
    assert type(pipe) is CLASSES[family]
    assert_close(theirs(pipe), expected)
    pictures = theirs(pipe, output_type="pt")
    assert_close(pictures, model.decode(expected))
    align_cli.remove_adapters(pipe)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    length = {"max_sequence_length": model.t5_length} if family == "sd3" else {}
    stock = pipe(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
                 **options, **length)  # fmt: skip
    assert_close(stock.images, plain)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc", "lcm"])
def test_schedulers_walk_our_paths(tiny_models, sampler):
    model = tiny_models["sd15"]
    spacings = {"ddim": ("leading", "trailing", "linspace", "lead"), "ddpm": ("leading", "lead"),
                "unipc": ("linspace", "trailing"), "lcm": ("lcm", "leading")}  # fmt: skip
    for spacing in spacings[sampler]:
        settings = {"sampler": sampler, "spacing": spacing, "steps": 6}
        if sampler == "ddim":
            settings["eta"] = 0.5
        expected = ours(model, [], **settings)
        assert_close(theirs(loaded(model, [], **settings)), expected)


@pytest.mark.slow
def test_a_velocity_model_with_zero_terminal_snr(tiny_v_folder):
    model = load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))
    for sampler, spacing in (("ddim", "trailing"), ("ddpm", "trailing"), ("ddim", "lead")):
        settings = {"sampler": sampler, "spacing": spacing}
        assert_close(theirs(loaded(model, [], **settings)), ours(model, [], **settings))


@pytest.mark.slow
@pytest.mark.parametrize("method", pairs.METHODS)
def test_sd21_with_velocity(method, tmp_path):
    model = pairs.load_tiny("sd21", tmp_path)
    spec = pairs.saved(tmp_path / "a", pairs.stirred(method, model))
    assert_close(theirs(loaded(model, [f"{spec}@0.7"])), ours(model, [f"{spec}@0.7"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:adapter")
def test_a_stack_with_scales(saved):
    model, soft = saved("softrepa", "sd15")
    _, text = saved("textcraftor", "sd15", test_grad_steps=3, lora_rank=2)
    _, long = saved("longalign", "sd15")
    _, other = saved("textcraftor", "sd15", test_grad_steps=1)
    specs = [f"{soft}@0.5", f"{text}@0.3", long, f"{other}@0.6"]
    assert_close(theirs(loaded(model, specs)), ours(model, specs))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_from_step_and_guidance_off(saved, family):
    model, spec = saved("textcraftor", family, test_grad_steps=1)
    for settings in ({"from_step": 2}, {"from_step": 0}, {"guidance": 1.0}):
        found = theirs(loaded(model, [spec], **settings))
        assert_close(found, ours(model, [spec], **settings))
    early, late = (ours(model, [spec], from_step=step) for step in (0, 3))
    assert (early - late).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize(("method", "family"), [("longalign", "sd15"), ("longalign", "sdxl"),
                                               ("textcraftor", "sdxl"), ("softrepa", "sd3")])  # fmt: skip
def test_pictures_per_prompt_and_negative_prompts(saved, method, family):
    model, spec = saved(method, family)
    pipe = loaded(model, [spec])
    doubled = [prompt for prompt in PROMPTS for _ in range(2)]
    seeds = [1, 2, 3, 4]
    assert_close(theirs(pipe, seeds=seeds, num_images_per_prompt=2), theirs(pipe, doubled, seeds))
    one = theirs(pipe, negative_prompt=["a blue square"] * 2)
    assert_close(one, theirs(pipe, negative_prompt=["a blue square", "a blue square"]))
    assert (one - theirs(pipe)).abs().max() > 1e-3
    alone = theirs(pipe, PROMPTS[0], SEEDS[:1], negative_prompt="a blue square")
    assert_close(alone, one[:1])
    with torch.no_grad():
        others = {"prompt_2": None, "prompt_3": None} if family == "sd3" else {}
        given = pipe.encode_prompt(PROMPTS, device=pipe.device, num_images_per_prompt=1,
                                   do_classifier_free_guidance=True, **others)  # fmt: skip
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    if method != "textcraftor":
        found = theirs(pipe, None, **dict(zip(names, given, strict=False)))
        assert_close(found, theirs(pipe))


@pytest.mark.filterwarnings("ignore:adapter")
def test_segments_read_one_text_and_say_so(saved):
    model, spec = saved("longalign", "sdxl")
    pipe = loaded(model, [spec])
    for name in ("prompt_2", "negative_prompt_2"):
        with pytest.raises(UserError, match=f"{name} does not apply: this pipeline reads prompts"):
            theirs(pipe, **{name: PROMPTS})
    with pytest.raises(UserError, match="clip_skip does not apply"):
        theirs(pipe, clip_skip=1)
    with pytest.raises(ValueError, match="1 negative prompts for 2"):
        theirs(pipe, negative_prompt=["a"])


def test_callbacks_see_and_change_what_is_there(saved):
    model, spec = saved("textcraftor", "sd15", test_grad_steps=2)
    pipe = loaded(model, [spec])
    steps, told = [], []
    pipe.unet.register_forward_pre_hook(
        lambda _, _args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def note(_, step, t, kwargs):
        steps.append((step, int(t)))
        assert kwargs["latents"].shape[0] == 2
        return {"prompt_embeds": torch.zeros_like(kwargs["prompt_embeds"])} if step == 2 else {}

    theirs(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert torch.equal(told[0], told[1]) and not torch.equal(told[1], told[2])
    assert not told[3].any()  # what the callback put there stays


def test_guidance_that_a_callback_cuts_off_keeps_the_steps_of_the_text(saved):
    model, spec = saved("textcraftor", "sd15", test_grad_steps=1)
    pipe = loaded(model, [spec])
    told = []
    pipe.unet.register_forward_pre_hook(
        lambda _, _args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def cut(pipe, step, t, kwargs):
        if step == 0:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": kwargs["prompt_embeds"][-2:]}
        return {}

    theirs(pipe, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [len(x) for x in told] == [4, 2, 2, 2]
    assert torch.equal(told[1], told[0][-2:]) and not torch.equal(told[3], told[1])


@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize("method", ["softrepa", "textcraftor", "longalign", "comat"])
def test_another_dtype_and_back(saved, method):
    model, spec = saved(method, "sd15")
    pipe = loaded(model, [spec])
    before = theirs(pipe)
    half = theirs(pipe.to(torch.bfloat16), latents=None)
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    bare = theirs(loaded(model, []).to(torch.bfloat16), latents=None)
    effect = (before - ours(model, [])).abs().mean()
    assert (half - bare).abs().mean() > effect / 2  # the adapter is at work there, too
    pipe.to(torch.float32)
    assert theirs(pipe).dtype == torch.float32 and before.dtype == torch.float32
    for encoder in (pipe.unet, pipe.text_encoder):
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_off_again_nothing_is_left(saved):
    model, spec = saved("textcraftor", "sd15", stage="joint")
    pipe = loaded(model, [spec])
    moved = [p.clone() for p in pipe.unet.parameters()]
    align_cli.remove_adapters(pipe)
    own = list(model.denoiser.parameters())
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), own, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(moved, own, strict=True))
    assert "encode_prompt" not in vars(pipe) and not pipe.unet._forward_pre_hooks
    for call in (align_cli.remove_adapters, align_cli.call_options):
        with pytest.raises(UserError, match="has no adapters of t2ialign"):
            call(pipe)


def test_a_method_that_moves_the_text_itself(saved, monkeypatch):
    """As that of docs/adding-a-method.md, beside a text encoder that begins to work later."""
    model, moved = saved("comat", "sd15")
    _, text = saved("textcraftor", "sd15", test_grad_steps=2)

    @contextmanager
    def attach(_: CoMat, model: BaseModel, scale: float = 1.0) -> Iterator[None]:
        def move(_module, args, kwargs):
            return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] + 0.5 * scale}

        handle = model.denoiser.register_forward_pre_hook(move, with_kwargs=True)
        yield
        handle.remove()

    monkeypatch.setattr(CoMat, "attach", attach)
    assert_close(theirs(loaded(model, [moved, text])), ours(model, [moved, text]))


def test_lora_that_diffusers_loads_on_top(saved, tmp_path):
    """It wraps the layers, and so renames their weights; ours come off all the same."""
    model, spec = saved("comat", "sd15")
    _, other = saved("dpt", "sd15")
    export(other, "diffusers", tmp_path / "lora")
    pipe = loaded(model, [spec])
    pipe.load_lora_weights(tmp_path / "lora")
    assert_close(theirs(pipe), ours(model, [spec, other]))
    options = align_cli.call_options(pipe)
    align_cli.remove_adapters(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    found = pipe(PROMPTS, **options, generator=generators, output_type="latent").images
    assert_close(found, ours(model, [other]))


def test_a_pipeline_with_lora_of_diffusers_that_moves(saved, tmp_path):
    model, spec = saved("comat", "sd15")
    export(spec, "diffusers", tmp_path / "lora")
    pipe = loaded(model, [spec])
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(UserError, match="move it before load_lora_weights"):
            theirs(pipe)


def test_adapters_that_cannot_follow_are_told_at_every_call(saved, monkeypatch):
    model, spec = saved("comat", "sd15")
    pipe = loaded(model, [spec])
    expected = theirs(pipe)
    pipe.to(torch.bfloat16)

    def refuse(*_: object) -> None:
        raise UserError("it does not fit")

    with monkeypatch.context() as context:
        context.setattr(installed, "restore", refuse)
        for _ in range(2):
            with pytest.raises(UserError, match="does not fit"):
                theirs(pipe)
    pipe.to(torch.float32)  # rounded to bfloat16 on the way
    assert (theirs(pipe) - expected).abs().mean() < (ours(model, []) - expected).abs().mean() / 4


@pytest.mark.parametrize("spacing", ["leading", "lead"])
def test_a_saved_pipeline_opens_with_diffusers_alone(saved, tmp_path, spacing):
    model, spec = saved("comat", "sd15")
    pipe = loaded(model, [spec], spacing=spacing)
    expected, options = theirs(pipe), align_cli.call_options(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(again.scheduler) is DDIMScheduler
    if spacing == "leading":
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        again.set_progress_bar_config(disable=True)
        assert_close(again(PROMPTS, **options, generator=generators, output_type="latent").images, expected)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_unipc_differs_by_the_rounding_of_its_coefficients_alone(tiny_v_folder, spacing):
    """In float32, as diffusers computes them, they are off by 1e-7, which this model makes 2e-4 of."""
    model = load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))
    settings = {"sampler": "unipc", "spacing": spacing}
    expected, pipe = ours(model, [], **settings), loaded(model, [], **settings)
    assert (theirs(pipe) - expected).abs().max() < 1e-3
    scheduler, stock = pipe.scheduler, pipe.scheduler.set_timesteps

    def in_double(*args: object, **options: object) -> None:
        stock(*args, **options)
        abar = scheduler.alphas_cumprod[scheduler.timesteps].double()
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1).double()])

    scheduler.set_timesteps = in_double
    assert_close(theirs(pipe), expected)


def test_the_command_and_the_pipeline_draw_one_picture(tmp_path):
    ok("sample", "--model", "tiny-sd15", "--prompt", PROMPTS[0], "--seed", 5, "--steps", 3, "--out", tmp_path)
    (file,) = tmp_path.glob("001-*.png")
    pipe = align_cli.load_pipeline("tiny-sd15", steps=3, device="cpu")
    options = align_cli.call_options(pipe)
    assert options["num_inference_steps"] == 3 and options["height"] == options["width"] == 32
    assert isinstance(pipe.scheduler, DDIMScheduler)
    picture = pipe(PROMPTS[0], **options, generator=torch.Generator().manual_seed(5)).images[0]
    apart = np.abs(np.asarray(picture).astype(int) - np.asarray(Image.open(file).convert("RGB")))
    assert apart.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_correct": 0.5}, "takes no self_correct: .* draw with t2ialign sample --self-correct"),
        ({"seed": 1}, "generator=torch.Generator"),
        ({"encoder_device": "cpu"}, "enable_model_cpu_offload"),
        ({"step": 1}, "load_pipeline: unknown option 'step'; did you mean 'steps'"),
        ({"sampler": "euler"}, "sampler"),
        ({"from_step": 0}, "from-step"),
        ({"adapters": "nowhere"}, "adapter nowhere does not exist"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        align_cli.load_pipeline("tiny-sd15", **options)


def test_an_adapter_of_another_family(saved, tiny_sdxl_folder):
    _, spec = saved("softrepa", "sd15")
    with pytest.raises(UserError, match="does not fit"):
        align_cli.load_pipeline(str(tiny_sdxl_folder), spec)


def test_a_recorded_self_correction_is_said_to_be_left_out(saved):
    model, spec = saved("dpt", "sd15")
    file = Path(spec) / "adapter.json"
    said = json.loads(file.read_text())
    said["config"]["sample"] = {"self_correct": 0.5}
    file.write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="recorded self_correct is left out"):
        align_cli.load_pipeline(model.model_id, spec, device="cpu")


@pytest.mark.slow
def test_importing_the_package_costs_no_torch():
    said = "import align_cli, sys; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", said + "; assert callable(align_cli.load_pipeline)"], check=True)
    said = "import align_cli.pipelines, sys; assert 'align_cli.cli' not in sys.modules"
    subprocess.run([sys.executable, "-c", said], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = align_cli.nothing
