"""SDXL: agreement with diffusers' own pipeline, loading, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from hub import serve
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
from align_cli.models.sdxl import size_ids
from align_cli.models.unet import unet_predict


@pytest.fixture(scope="module")
def model(tiny_sdxl_folder):
    return load(tiny_sdxl_folder)


def test_facts(model, tiny_sdxl_folder):
    assert (model.family, model.model_id) == ("sdxl", str(tiny_sdxl_folder))
    assert (model.image_size, model.vae_factor, model.size_factor, model.latent_channels) == (32, 4, 4, 4)
    assert (model.text_width, model.pooled_width, model.token_limit) == (40, 24, 32)
    assert model.token_count("a red circle") == 5
    assert model.process.prediction_type == "epsilon"
    assert model.process.timesteps(4).tolist() == [751, 501, 251, 1]
    assert model.process.final_alpha_cumprod == float(model.process.alphas_cumprod[0])
    check_frozen(model.denoiser, model.vae, *model.encoders)


@pytest.mark.parametrize("zeros", [True, False])
def test_text_equals_the_pipeline(make_tiny_sdxl, tmp_path, zeros):
    folder = make_tiny_sdxl(tmp_path / "xl", zeros_for_empty=zeros)
    pipe, model = pipeline(StableDiffusionXLPipeline, folder), load(folder)
    with torch.no_grad():
        tokens, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS)
    cond, uncond = model.encode_text(PROMPTS), model.uncond(2)
    assert cond.tokens.shape == (2, 32, 40) and cond.pooled.shape == (2, 24)
    for ours, theirs in (
        (cond.tokens, tokens), (cond.pooled, pooled), (uncond.tokens, empty), (uncond.pooled, empty_pooled),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (uncond.tokens == 0).all() == (uncond.pooled == 0).all() == zeros
    assert not cond.tokens.requires_grad and not cond.pooled.requires_grad


def test_text_encoders_get_gradient_only_if_they_ask(model):
    check_text_gradient(model)


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 4), ("trailing", 3)])
def test_sampling_equals_the_pipeline(model, tiny_sdxl_folder, spacing, steps):
    pipe = pipeline(StableDiffusionXLPipeline, tiny_sdxl_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    check_sampling(model, pipe, steps, 7.0, ours={"spacing": spacing}, theirs={})


def test_predict_fills_in_the_size(model):
    z, cond, t = field(0, 2, 4, 8, 16), model.encode_text(PROMPTS), torch.tensor(500)
    ids = size_ids(z, model.vae_factor)
    assert ids.tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    plain = model.predict(z, t, cond)
    assert cond.time_ids is None
    torch.testing.assert_close(plain, model.predict(z, t, dataclasses.replace(cond, time_ids=ids)))
    expected = model.denoiser(
        z, 500, cond.tokens, added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": ids}
    ).sample
    torch.testing.assert_close(plain, expected)
    for other in (
        dataclasses.replace(cond, time_ids=ids.flip(1)),
        TextCond(cond.tokens, cond.pooled[[1, 0]]),
        TextCond(cond.tokens[[1, 0]], cond.pooled),
    ):
        assert not torch.allclose(model.predict(z, t, other), plain, atol=1e-5)
    with pytest.raises(ValueError, match="pooled text without time_ids"):
        unet_predict(model.denoiser, z, t, cond)


# ---------------------------------------------------------------- where it comes from


@pytest.mark.slow
def test_shards_and_half_precision(make_tiny_sdxl, tiny_sdxl_folder, tmp_path):
    full, z, t = load(tiny_sdxl_folder), field(0, 1, 4, 8, 8), torch.tensor(400)
    expected = full.predict(z, t, full.encode_text(PROMPTS[:1]))
    sharded = make_tiny_sdxl(tmp_path / "sharded", max_shard_size="30KB")
    assert (sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    model = load(sharded)
    assert torch.equal(model.predict(z, t, model.encode_text(PROMPTS[:1])), expected)
    half = make_tiny_sdxl(tmp_path / "half", variant="fp16", max_shard_size="30KB")
    for dtype in ("float32", "float16", "bfloat16"):
        model = load(half, dtype=dtype)
        cond = model.encode_text(PROMPTS[:1])
        assert cond.tokens.dtype == cond.pooled.dtype == model.uncond(1).tokens.dtype == model.dtype
        got = model.predict(z, t, cond)
        assert got.dtype == getattr(torch, dtype)
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


def test_its_autoencoder_stays_float32_if_it_overflows(tiny_sdxl_folder, tmp_path):
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "xl")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": True}))
    model = load(folder, dtype="float16")
    assert (model.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    full, pixels, noise = load(folder), field(0, 1, 3, 32, 32).clamp(-1, 1), field(1, 1, 4, 8, 8)
    latents = model.encode_image(pixels, noise)
    assert torch.equal(latents, full.encode_image(pixels, noise))
    assert torch.equal(model.decode(latents), full.decode(latents))
    assert load(folder, dtype="bfloat16").vae.dtype == torch.bfloat16
    assert load(tiny_sdxl_folder, dtype="float16").vae.dtype == torch.float16


@pytest.mark.slow
def test_other_autoencoder(make_tiny_sdxl, tiny_sdxl_folder, tiny_sd3_no_t5_folder, tmp_path):
    other = make_tiny_sdxl(tmp_path / "other", seed=1)
    expected = load(other).vae.decoder.conv_in.weight
    for name in (other, other / "vae"):
        model = load(tiny_sdxl_folder, vae=str(name))
        assert torch.equal(model.vae.decoder.conv_in.weight, expected)
        assert torch.equal(model.denoiser.conv_in.weight, load(tiny_sdxl_folder).denoiser.conv_in.weight)
    own = shutil.copytree(tiny_sdxl_folder, tmp_path / "bare")
    shutil.rmtree(own / "vae")  # not needed then
    assert torch.equal(load(own, vae=str(other)).vae.decoder.conv_in.weight, expected)
    with pytest.raises(UserError, match="is incomplete: no vae/"):
        load(own)
    with pytest.raises(UserError, match="reads 4 channels, but the autoencoder has 16"):
        load(tiny_sdxl_folder, vae=str(tiny_sd3_no_t5_folder))
    with pytest.raises(UserError, match="a AutoencoderKL is wanted here, and .* holds a UNet2DCondition"):
        load(tiny_sdxl_folder, vae=str(other / "unet"))


@pytest.mark.slow
def test_hub(make_tiny_sdxl, tmp_path, monkeypatch):
    root = tmp_path / "hub"
    make_tiny_sdxl(root / "org" / "xl", max_shard_size="30KB")
    other = make_tiny_sdxl(tmp_path / "other", seed=1)
    fixed = load(other).vae.decoder.conv_in.weight
    shutil.copytree(other / "vae", root / "org" / "vae-fix")
    with serve(root, tmp_path / "cache", monkeypatch) as log:
        model = load("org/xl", vae="org/vae-fix")
        assert model.model_id == "org/xl"
        assert torch.equal(model.vae.decoder.conv_in.weight, fixed)
        assert not any(name.startswith("vae/") for name in log)
        assert "config.json" in log and "diffusion_pytorch_model.safetensors" in log
        assert sum(name.startswith("unet/") and name.endswith(".safetensors") for name in log) > 1
        with pytest.raises(UserError, match="org/vae-fix is no diffusers pipeline"):
            load("org/vae-fix")
        with pytest.raises(UserError, match="the hub has no model org/none"):
            load("org/xl", vae="org/none")


# ---------------------------------------------------------------- what does not fit


@pytest.mark.slow
def test_wrong_denoisers(tiny_sdxl_folder, tiny_sd15_folder, tiny_sd3_folder, make_tiny_sdxl, tmp_path):
    with pytest.raises(UserError, match="is not one of SDXL: it takes no pooled text"):
        load(tiny_sdxl_folder, unet=str(tiny_sd15_folder))
    with pytest.raises(UserError, match="is one of SDXL; it needs the rest of an SDXL pipeline"):
        load(tiny_sd15_folder, unet=str(tiny_sdxl_folder))
    for name in (tiny_sd3_folder, tiny_sd3_folder / "transformer"):
        with pytest.raises(
            UserError, match="a UNet2DConditionModel is wanted here, and .* holds a SD3Transformer2DModel"
        ) as caught:
            load(tiny_sdxl_folder, unet=str(name))
        assert "\n" not in str(caught.value)
    wide = make_tiny_sdxl(tmp_path / "wide", widths=(24, 24))
    with pytest.raises(UserError, match="reads 48-wide text, but the text encoder gives 40"):
        load(tiny_sdxl_folder, unet=str(wide))
    swapped = make_tiny_sdxl(tmp_path / "swapped", widths=(24, 16))
    with pytest.raises(UserError, match="reads 16-wide pooled text, but the text encoder gives 24"):
        load(tiny_sdxl_folder, unet=str(swapped / "unet"))
    own = load(tiny_sdxl_folder, unet=str(make_tiny_sdxl(tmp_path / "tuned", seed=3)))
    assert not torch.equal(own.denoiser.conv_in.weight, load(tiny_sdxl_folder).denoiser.conv_in.weight)


def test_missing_parts(make_tiny_sdxl, tmp_path):
    folder = make_tiny_sdxl(tmp_path / "xl", max_shard_size="30KB")
    shard = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=rf"is incomplete: no unet/{shard.name} in"):
        load(folder)
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot load the unet of"):
        load(folder)
    shard.write_bytes(content)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match=r"is incomplete: no text_encoder_2/model.safetensors"):
        load(folder)
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(UserError, match="incomplete|cannot load the tokenizer_2") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_settings_without_effect_are_told(tiny_sdxl_folder):
    with pytest.warns(UserWarning, match="model.t5_length has no effect: .* has no T5"):
        load(tiny_sdxl_folder, t5_length=77)
