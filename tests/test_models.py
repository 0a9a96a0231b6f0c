"""Base models: loading from everywhere, agreement with diffusers' own pipeline, and one clear line for every
mistake.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hub import serve
from huggingface_hub import constants
from model_helpers import (
    PROMPTS,
    check_frozen,
    check_sampling,
    check_text_gradient,
    field,
    load,
    pipeline,
)

from align_cli.errors import UserError
from align_cli.models.base import TextCond
from align_cli.models.loading import pick_device
from align_cli.models.unet import unet_family


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load(tiny_sd15_folder)


# ---------------------------------------------------------------- the contract


def test_facts(model, tiny_sd15_folder):
    assert (model.family, model.model_id) == ("sd15", str(tiny_sd15_folder))
    assert (model.image_size, model.vae_factor, model.latent_channels, model.token_limit) == (32, 4, 4, 32)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.process.prediction_type == "epsilon"
    check_frozen(model.denoiser, model.vae, model.text_encoder)
    assert [unet_family(w) for w in (768, 1024, 32)] == ["sd15", "sd21", "sd15"]


def test_text(model):
    cond = model.encode_text(PROMPTS)
    assert cond.tokens.shape == (2, 32, 32)
    assert not cond.tokens.requires_grad
    assert torch.equal(cond.tokens[0, 0], cond.tokens[1, 0])  # causal: the first row does not see the prompt
    torch.testing.assert_close(
        model.uncond(3).tokens, model.encode_text([""] * 3).tokens, atol=1e-6, rtol=1e-6
    )
    assert model.token_count("a red circle") == 5
    assert model.token_count("red " * 40) == 42
    model.encode_text(["red " * 40])  # truncated, not refused


def test_text_encoder_gets_gradient_only_if_it_asks(model):
    assert model.encoders == [model.text_encoder]
    check_text_gradient(model)


def test_images(model):
    pixels = field(0, 2, 3, 32, 32).clamp(-1, 1)
    mean = model.encode_image(pixels)
    assert mean.shape == (2, 4, 8, 8)
    noise = field(1, 2, 4, 8, 8)
    posterior = model.vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise) * model.vae.config.scaling_factor
    torch.testing.assert_close(model.encode_image(pixels, noise), expected)
    latents = field(2, 2, 4, 8, 8).requires_grad_()
    loud = model.decode(latents * 100, clamp=False)
    assert loud.min() < 0 < 1 < loud.max()
    picture = model.decode(latents * 100)
    assert (picture.min(), picture.max()) == (0, 1)
    model.decode(latents).mean().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


def test_predict(model):
    z, cond = field(0, 2, 4, 8, 8), model.encode_text(PROMPTS)
    one = model.predict(z, torch.tensor(500), cond)
    torch.testing.assert_close(model.predict(z, torch.tensor([500, 500]), cond), one)
    expected = model.denoiser(z, 500, encoder_hidden_states=cond.tokens).sample
    torch.testing.assert_close(one, expected)
    assert not torch.allclose(model.predict(z, torch.tensor(100), cond), one)
    assert not torch.allclose(model.predict(z, torch.tensor(500), cond[[1, 0]]), one)


def test_rows_of_conditions():
    cond = TextCond(torch.arange(6.0).view(3, 1, 2), pooled=torch.arange(3.0)[:, None])
    both = TextCond.cat([cond, cond[1:]])
    assert len(both) == 5
    assert both.pooled is not None and both.pooled[:, 0].tolist() == [0, 1, 2, 1, 2]
    assert both.time_ids is None


# ---------------------------------------------------------------- diffusers' own pipeline


@pytest.mark.parametrize("folder", ["tiny_sd15_folder", "tiny_v_folder"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 4), ("trailing", 5), ("linspace", 3)])
def test_sampling_equals_the_diffusers_pipeline(folder, spacing, steps, request):
    folder = request.getfixturevalue(folder)
    pipe = pipeline(StableDiffusionPipeline, folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    check_sampling(load(folder), pipe, steps, 5.0, ours={"spacing": spacing}, theirs={})


# ---------------------------------------------------------------- where models come from


def test_fp16_variant_and_dtype(make_tiny_sd15, tiny_sd15_folder, tmp_path):
    folder = make_tiny_sd15(tmp_path / "half", variant="fp16")
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    full = load(tiny_sd15_folder)
    for dtype in ("float32", "float16", "bfloat16"):
        model = load(folder, dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        weights = model.denoiser.conv_in.weight.float()
        torch.testing.assert_close(weights, full.denoiser.conv_in.weight, atol=1e-2, rtol=1e-2)
        assert model.predict(field(0, 1, 4, 8, 8), torch.tensor(1), model.uncond(1)).dtype == model.dtype


def test_relative_folder_is_known_from_anywhere(tiny_sd15_folder, monkeypatch):
    monkeypatch.chdir(tiny_sd15_folder.parent)
    assert load("tiny").model_id == str(tiny_sd15_folder)


def test_pickled_weights(tiny_sd15_folder, tmp_path):
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_sd15_folder, tmp_path / "pickled")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        file = next((folder / part).glob("*.safetensors"))
        torch.save(load_file(file), folder / part / f"{stem}.bin")
        file.unlink()
    model, full = load(folder), load(tiny_sd15_folder)
    assert torch.equal(model.denoiser.conv_in.weight, full.denoiser.conv_in.weight)
    torch.testing.assert_close(model.uncond(1).tokens, full.uncond(1).tokens)


def test_other_denoiser(make_tiny_sd15, tiny_sd15_folder, tmp_path):
    other = make_tiny_sd15(tmp_path / "other", seed=1)
    for name in (other, other / "unet"):
        model = load(tiny_sd15_folder, unet=str(name))
        assert torch.equal(model.denoiser.conv_in.weight, load(other).denoiser.conv_in.weight)
        assert torch.equal(
            model.vae.decoder.conv_in.weight, load(tiny_sd15_folder).vae.decoder.conv_in.weight
        )
    wide = make_tiny_sd15(tmp_path / "wide", width=64)
    with pytest.raises(UserError, match="reads 64-wide text, but the text encoder gives 32"):
        load(tiny_sd15_folder, unet=str(wide))
    (other / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model.safetensors \(or .bin\)"):
        load(tiny_sd15_folder, unet=str(other / "unet"))


@pytest.fixture
def hub(tiny_sd15_folder, tmp_path, monkeypatch) -> Iterator[list[str]]:
    """A hub with org/tiny (and org/plain, which is no pipeline). Yields the list of fetched files."""
    root = tmp_path / "hub"
    shutil.copytree(tiny_sd15_folder, root / "org" / "tiny")
    (root / "org" / "tiny" / "safety_checker").mkdir()
    (root / "org" / "tiny" / "safety_checker" / "model.safetensors").write_bytes(b"never fetched")
    (root / "org" / "plain").mkdir()
    with serve(root, tmp_path / "cache", monkeypatch) as log:
        yield log


def test_hub_and_its_cache(hub, tiny_sd15_folder, monkeypatch):
    model = load("org/tiny")
    assert model.model_id == "org/tiny"
    assert sum(name.endswith(".safetensors") for name in hub) == 3
    assert not any("safety" in name for name in hub)
    fetched = len(hub)
    load("org/tiny")
    assert len(hub) == fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = load("org/tiny")
    weight = load(tiny_sd15_folder).denoiser.conv_in.weight
    assert torch.equal(offline.denoiser.conv_in.weight, weight)
    shutil.rmtree(next(Path(constants.HF_HUB_CACHE).glob("models--org--tiny/snapshots/*/vae")))
    with pytest.raises(UserError, match="org/tiny is incomplete: no vae/"):
        load("org/tiny")


def test_hub_refusals(hub):
    for name, message in {
        "org/none": "the hub has no model org/none",
        "org/plain": "is no diffusers pipeline: it has no model_index.json",
        "org/gated": "asks for its licence",
        "org/b@d": "is no hub id",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_no_network_and_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"sd15 \(stable-diffusion-v1-5/.*not in the local cache.*--model /path"
    ) as caught:
        load("sd15")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/snapshots/*/*"))


# ---------------------------------------------------------------- what is no model


def broken(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "broken")


def test_not_a_model(tiny_sd15_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no diffusers pipeline folder: it has no model_index.json"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"unknown model 'sd51'; did you mean"):
        load("sd51")
    folder = broken(tiny_sd15_folder, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="holds a FluxPipeline; supported are Stable Diffusion 1.x and 2.x"):
        load(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


def test_damaged_models(tiny_sd15_folder, tmp_path):
    folder = broken(tiny_sd15_folder, tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="cannot load the unet of"):
        load(folder)
    from safetensors.torch import load_file, save_file

    file.write_bytes(whole)
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "conv_in.bias"}, file)
    with pytest.raises(UserError, match=r"lacks 1 weights in .* first conv_in.bias"):
        load(folder)
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"unet of .*"):
        load(folder)
    file.write_bytes(whole)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="incomplete: no vae/config.json"):
        load(folder)


def test_unsupported_schedule(tiny_sd15_folder, tmp_path):
    folder = broken(tiny_sd15_folder, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "score"}))
    with pytest.raises(UserError, match="scheduler: unsupported prediction_type 'score'"):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no scheduler_config.json"):
        load(folder)


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda9x", "meta", "xpu"):
        with pytest.raises(UserError, match="device"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(UserError, match=f"device {name} is not there.*--device cpu"):
            pick_device(name)
