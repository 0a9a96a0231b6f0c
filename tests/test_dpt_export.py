"""Adapters of DPT in the formats of other tools: the LoRA, the discriminator beside it, the official file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from dpt_files import lora, official, official_lora, save_dpt
from peft import PeftModel
from safetensors.torch import load_file

from align_cli.adapters import import_official, load_adapter, write_adapter
from align_cli.errors import UserError
from align_cli.exporting import export
from align_cli.exporting.compare import outputs
from align_cli.models.loading import load_model
from align_cli.models.tuning import tuning_like
from align_cli.settings import ModelSettings

BESIDE = "discriminator.safetensors"


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


def prediction(model, denoiser=None) -> torch.Tensor:
    """What the denoiser says, perhaps another one's."""
    if denoiser is None:
        return outputs(model, denoiser=True).prediction
    with model.using(denoiser=denoiser):
        return outputs(model, denoiser=True).prediction


def lora_at_work(model) -> torch.Tensor:
    tuning = tuning_like(model.denoiser, lora(model.denoiser))
    tuning.load_state(lora(model.denoiser))
    with tuning.attached():
        return prediction(model)


def test_the_libraries_open_the_lora(model, tmp_path):
    save_dpt(tmp_path / "a", model)
    expected, plain = lora_at_work(model), prediction(model)
    assert (expected - plain).abs().max() > 0.05
    for form, file in (("diffusers", "pytorch_lora_weights.safetensors"), ("kohya", "lora.safetensors")):
        report = export(tmp_path / "a", form, tmp_path / form)
        assert set(report.written) == {file, BESIDE} and "rank 2" in report.written[file]
        assert report.notes == [
            "the LoRA works without the discriminator, which t2ialign uses for --self-correct and for eval "
            "dpt-probe: no other tool does"
        ]
        pipe = StableDiffusionPipeline.from_pretrained(model.model_id)
        pipe.load_lora_weights(tmp_path / form, weight_name=file)
        torch.testing.assert_close(prediction(model, pipe.unet), expected, atol=1e-4, rtol=0)
        beside = load_file(tmp_path / form / BESIDE)
        assert beside.keys() == official().keys()
        assert all(torch.equal(beside[key], x) for key, x in official().items())
    export(tmp_path / "a", "peft", tmp_path / "peft")
    said = json.loads((tmp_path / "peft" / "unet" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == 2
    mine = load_model(ModelSettings(name=model.model_id, device="cpu"))
    opened = PeftModel.from_pretrained(mine.denoiser, tmp_path / "peft" / "unet")
    torch.testing.assert_close(prediction(model, opened), expected, atol=1e-4, rtol=0)


def test_the_official_file_and_back(model, tmp_path):
    state = save_dpt(tmp_path / "a", model)
    report = export(tmp_path / "a", "official", tmp_path / "out")
    assert list(report.written) == ["pytorch_model.bin"] and "LoRA of rank 2" in str(report.written)
    assert any("largest difference 0 " in line for line in report.check)
    content = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert content.keys() == official().keys() | official_lora(model.denoiser).keys()
    assert report.notes == [
        "the file does not tell the official code: --hidden_dim 16 --dim_feedforward 24 --num_queries_rec 5 "
        "--contrastive_loss_hdim 6 --lora_rank 2"
    ]
    import_official("dpt", tmp_path / "out", model.model_id, tmp_path / "back")
    again = load_adapter(tmp_path / "back")
    assert again.info.stage == "tune" and again.state.keys() == state.keys()
    assert all(torch.equal(again.state[key], x) for key, x in state.items())
    report = export(tmp_path / "a", "official", tmp_path / "half", dtype="float16")
    content = torch.load(tmp_path / "half" / "pytorch_model.bin", weights_only=True)
    assert {x.dtype for x in content.values()} == {torch.float16}


def test_a_probe_is_official_alone(model, tmp_path):
    state = save_dpt(tmp_path / "a", model, "probe")
    for form in ("diffusers", "peft", "kohya"):
        with pytest.raises(UserError, match=rf"\(stage probe\) changes nothing .*--to {form} has nothing"):
            export(tmp_path / "a", form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export(tmp_path / "a", "official", tmp_path / "out")
    assert report.written["pytorch_model.bin"] == "discriminator, the official file, float32"
    assert "--lora_rank" not in report.notes[0]
    import_official("dpt", tmp_path / "out", model.model_id, tmp_path / "back")
    again = load_adapter(tmp_path / "back")
    assert again.info.stage == "probe"
    assert all(torch.equal(again.state[key], x) for key, x in state.items())


def test_refusals(model, tiny_models, tmp_path):
    save_dpt(tmp_path / "a", model)
    save_dpt(tmp_path / "probe", model, "probe")
    save_dpt(tmp_path / "xl", tiny_models["sdxl"])
    adapter = load_adapter(tmp_path / "a")
    unet = {key: x for key, x in adapter.state.items() if key.startswith("unet.")}
    write_adapter(tmp_path / "empty", adapter.info, unet)
    for name, form, message, options in (
        ("a", "peft", "is LoRA of rank 2 already; leave --rank out", {"rank": 2}),
        ("a", "webui", "unknown export format of dpt 'webui'", {}),
        ("a", "peft", "the unet of the adapter does not fit", {"model": tiny_models["sdxl"].model_id}),
        ("empty", "peft", r"is damaged: it holds no discriminator \(discriminator", {}),
        ("xl", "official", "knows Stable Diffusion 1.x and 2.x; this adapter is for sdxl", {}),
        (
            "probe",
            "official",
            "an official file has the rank that was trained; leave --rank out",
            {"rank": 2},
        ),
    ):
        before = sorted(Path(tmp_path).iterdir())
        with pytest.raises(UserError, match=message) as caught:
            export(tmp_path / name, form, tmp_path / "out", **options)
        assert "\n" not in str(caught.value) and sorted(Path(tmp_path).iterdir()) == before


def test_sdxl_in_the_layout_of_kohya(tiny_models, tmp_path):
    save_dpt(tmp_path / "a", tiny_models["sdxl"])
    export(tmp_path / "a", "kohya", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert any(key.startswith("lora_unet_middle_block_1_transformer_blocks") for key in tensors)
