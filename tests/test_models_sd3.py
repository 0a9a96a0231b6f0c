"""SD3: agreement with diffusers' own pipeline, with T5 and without, loading, and one clear line for every
mistake.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
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
from align_cli.models.sd3 import mmdit_predict
from align_cli.settings import ModelSettings

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def model(tiny_sd3_folder):
    return load(tiny_sd3_folder)


@pytest.fixture(scope="module")
def no_t5(tiny_sd3_no_t5_folder):
    with pytest.warns(UserWarning, match="has no T5 .* zeros stand in its place"):
        return load(tiny_sd3_no_t5_folder)


def test_facts(model, no_t5, tiny_sd3_folder):
    assert (model.family, model.model_id) == ("sd3", str(tiny_sd3_folder))
    assert (model.image_size, model.vae_factor, model.size_factor, model.max_image_size) == (32, 4, 8, 128)
    assert (model.text_width, model.t5_length, model.clip_length, model.token_limit) == (48, 24, 32, 24)
    assert (model.latent_channels, no_t5.latent_channels) == (4, 16)
    assert (no_t5.t5_length, no_t5.token_limit) == (32, 32)
    assert (model.token_count("a red circle"), no_t5.token_count("a red circle")) == (4, 5)
    assert (model.process.shift, model.process.prediction_type) == (3.0, "flow")
    assert len(model.encoders) == 3 and len(no_t5.encoders) == 2
    check_frozen(model.denoiser, model.vae, *model.encoders)


def check_text(model, pipe: StableDiffusion3Pipeline, rows: int) -> None:
    with torch.no_grad():
        tokens, empty, pooled, empty_pooled = pipe.encode_prompt(
            PROMPTS, None, None, max_sequence_length=rows
        )
    cond, uncond = model.encode_text(PROMPTS), model.uncond(2)
    assert cond.tokens.shape == (2, 32 + rows, 48) and cond.pooled.shape == (2, 40)
    for ours, theirs in (
        (cond.tokens, tokens), (cond.pooled, pooled), (uncond.tokens, empty), (uncond.pooled, empty_pooled),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (cond.tokens[:, :32, 40:] == 0).all()
    assert not cond.tokens.requires_grad and not cond.pooled.requires_grad


def test_text_equals_the_pipeline(make_tiny_sd3, tmp_path):
    folder = make_tiny_sd3(tmp_path / "sd3", t5_tokens=512)
    pipe = pipeline(StableDiffusion3Pipeline, folder)
    check_text(load(folder), pipe, 512)  # the official length, not the pipeline's 256
    check_text(load(folder, t5_length=20), pipe, 20)


def test_text_without_t5(no_t5, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    check_text(no_t5, pipeline(StableDiffusion3Pipeline, tiny_sd3_no_t5_folder, **NO_T5), 32)
    dropped = load(tiny_sd3_folder, t5_length=0)
    assert len(dropped.encoders) == 2
    check_text(dropped, pipeline(StableDiffusion3Pipeline, tiny_sd3_folder, **NO_T5), 32)
    assert (dropped.encode_text(PROMPTS).tokens[:, 32:] == 0).all()


def test_text_encoders_get_gradient_only_if_they_ask(model):
    check_text_gradient(model)


@pytest.mark.parametrize(("folder", "options"), [("tiny_sd3_folder", {}), ("tiny_sd3_no_t5_folder", NO_T5)])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.filterwarnings("ignore:.*has no T5")
def test_sampling_equals_the_pipeline(folder, options, steps, request):
    folder = request.getfixturevalue(folder)
    pipe, model = pipeline(StableDiffusion3Pipeline, folder, **options), load(folder)
    rows = {"max_sequence_length": model.t5_length}
    check_sampling(model, pipe, steps, 4.0, ours={"sampler": "euler"}, theirs=rows)


def test_images(model):
    pixels, noise = field(0, 2, 3, 32, 32).clamp(-1, 1), field(1, 2, 4, 8, 8)
    found = model.vae.encode(pixels).latent_dist
    expected = (found.mean + found.std * noise - 0.0609) * 1.5305
    torch.testing.assert_close(model.encode_image(pixels, noise), expected)
    posterior = model.posterior(pixels)
    assert torch.equal(posterior.draw(noise), model.encode_image(pixels, noise))
    assert torch.equal(posterior.draw(None), model.encode_image(pixels))
    latents = field(2, 2, 4, 8, 8).requires_grad_()
    picture = model.vae.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(latents, clamp=False), picture)
    model.decode(latents).mean().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


def test_predict(model):
    z, cond = field(0, 2, 4, 8, 8), model.encode_text(PROMPTS)
    one = model.predict(z, torch.tensor(500), cond)
    torch.testing.assert_close(model.predict(z, torch.tensor([500.0, 500.0]), cond), one)
    expected = model.denoiser(z, cond.tokens, cond.pooled, torch.tensor([500, 500])).sample
    torch.testing.assert_close(one, expected)
    swapped = cond[[1, 0]]
    mixed = TextCond(swapped.tokens, cond.pooled), TextCond(cond.tokens, swapped.pooled)
    for t, other in ((100, cond), *((500, other) for other in mixed)):
        assert not torch.allclose(model.predict(z, torch.tensor(t), other), one, atol=1e-4)
    with pytest.raises(ValueError, match="needs pooled text"):
        mmdit_predict(model.denoiser, z, torch.tensor(500), TextCond(cond.tokens))


# ---------------------------------------------------------------- where it comes from


def test_shards_and_half_precision(make_tiny_sd3, tiny_sd3_folder, tmp_path):
    full, z, t = load(tiny_sd3_folder), field(0, 1, 4, 8, 8), torch.tensor(400)
    expected = full.predict(z, t, full.encode_text(PROMPTS[:1]))
    sharded = make_tiny_sd3(tmp_path / "sharded", max_shard_size="20KB")
    assert (sharded / "text_encoder_3" / "model.safetensors.index.json").is_file()
    model = load(sharded)
    assert torch.equal(model.predict(z, t, model.encode_text(PROMPTS[:1])), expected)
    half = make_tiny_sd3(tmp_path / "half", variant="fp16", max_shard_size="20KB")
    assert (half / "text_encoder_3" / "model.safetensors.index.fp16.json").is_file()
    for dtype in ("float32", "float16", "bfloat16"):
        model = load(half, dtype=dtype)
        cond = model.encode_text(PROMPTS[:1])
        assert cond.tokens.dtype == cond.pooled.dtype == model.dtype == model.vae.dtype
        got = model.predict(z, t, cond)
        assert got.dtype == getattr(torch, dtype)
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


def test_double_attention_of_sd35(no_t5):
    blocks = no_t5.denoiser.transformer_blocks
    assert [block.use_dual_attention for block in blocks] == [True, True, False]
    assert blocks[0].attn.norm_q is not None


def test_hub_fetches_t5_only_if_it_is_wanted(make_tiny_sd3, tmp_path, monkeypatch):
    root = tmp_path / "hub"
    make_tiny_sd3(root / "org" / "sd3", max_shard_size="20KB")
    with serve(root, tmp_path / "cache", monkeypatch) as log:
        load("org/sd3", t5_length=0)
        assert not any(name.startswith(("text_encoder_3", "tokenizer_3")) for name in log)
        before = len(log)
        model = load("org/sd3")
        new = log[before:]
        assert all(name.startswith(("text_encoder_3", "tokenizer_3")) for name in new)
        assert sum(name.endswith(".safetensors") for name in new) > 1
    torch.testing.assert_close(
        model.encode_text(PROMPTS).tokens, load(root / "org" / "sd3").encode_text(PROMPTS).tokens
    )


# ---------------------------------------------------------------- what does not fit


def test_wrong_parts(tiny_sd3_folder, tiny_sd15_folder, make_tiny_sd3, tiny_sd3_no_t5_folder, tmp_path):
    for name, held in ((tiny_sd15_folder, "UNet2D"), (tiny_sd15_folder / "unet", "UNet2D")):
        with pytest.raises(
            UserError, match=f"a SD3Transformer2DModel is wanted here, and .* holds a {held}"
        ) as caught:
            load(tiny_sd3_folder, unet=str(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="reads 16 channels, but the autoencoder has 4"):
        load(tiny_sd3_folder, unet=str(tiny_sd3_no_t5_folder))
    tuned = make_tiny_sd3(tmp_path / "tuned", seed=5)
    for name in (tuned, tuned / "transformer"):
        own = load(tiny_sd3_folder, unet=str(name)).denoiser.proj_out.weight
        assert torch.equal(own, load(tuned).denoiser.proj_out.weight)
    folder = shutil.copytree(tiny_sd3_folder, tmp_path / "wide")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"joint_attention_dim": 44}))
    with pytest.raises(UserError, match="transformer"):
        load(folder)


def test_missing_t5(tiny_sd3_folder, tmp_path):
    folder = shutil.copytree(tiny_sd3_folder, tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(
        UserError, match=r"incomplete: no text_encoder_3/model.safetensors .*set model.t5_length = 0 to go"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(load(folder, t5_length=0).encoders) == 2
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="has no T5"):
        assert load(folder).t5_length == 32


def test_unsupported_schedule(tiny_sd3_folder, tmp_path):
    folder = shutil.copytree(tiny_sd3_folder, tmp_path / "sd3")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(UserError, match="scheduler: unsupported use_dynamic_shifting"):
        load(folder)


def test_length_of_t5():
    for wrong in (-1, 513):
        with pytest.raises(UserError, match="model.t5_length must be between 0 and 512"):
            ModelSettings(t5_length=wrong)
