"""Adapters of CoMat in the formats of other tools, and the official file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comat_files import FILE, official, save_comat
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from dpt_files import lora
from peft import PeftModel
from safetensors.torch import load_file

from align_cli.adapters import import_official, load_adapter, write_adapter
from align_cli.errors import UserError
from align_cli.exporting import export
from align_cli.exporting.compare import outputs
from align_cli.models.loading import load_model
from align_cli.models.tuning import tuning_like
from align_cli.settings import ModelSettings

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_libraries_open_the_lora(tiny_models, family, tmp_path):
    model = tiny_models[family]
    save_comat(tmp_path / "a", model)
    expected, plain = lora_at_work(model), prediction(model)
    assert (expected - plain).abs().max() > 0.05
    files = {"diffusers": FILE} | ({"kohya": "lora.safetensors"} if family == "sd15" else {})
    for form, file in files.items():
        report = export(tmp_path / "a", form, tmp_path / form)
        assert set(report.written) == {file} and "rank 2" in report.written[file] and report.notes == []
        pipe = PIPELINES[family].from_pretrained(model.model_id)
        pipe.load_lora_weights(tmp_path / form, weight_name=file)
        torch.testing.assert_close(prediction(model, pipe.unet), expected, atol=1e-4, rtol=0)
    export(tmp_path / "a", "peft", tmp_path / "peft")
    said = json.loads((tmp_path / "peft" / "unet" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == 2
    mine = load_model(ModelSettings(name=model.model_id, device="cpu"))
    opened = PeftModel.from_pretrained(mine.denoiser, tmp_path / "peft" / "unet")
    torch.testing.assert_close(prediction(model, opened), expected, atol=1e-4, rtol=0)


def test_sd3_in_diffusers_and_peft(tiny_models, tmp_path):
    """Both streams of the transformer; kohya's layout and the official file are refused."""
    model = tiny_models["sd3"]
    save_comat(tmp_path / "a", model)
    expected, plain = lora_at_work(model), prediction(model)
    assert (expected - plain).abs().max() > 0.05
    report = export(tmp_path / "a", "diffusers", tmp_path / "diffusers")
    assert "transformer (rank 2, 22 layers)" in report.written[FILE]
    pipe = StableDiffusion3Pipeline.from_pretrained(model.model_id)
    pipe.load_lora_weights(tmp_path / "diffusers")
    torch.testing.assert_close(prediction(model, pipe.transformer), expected, atol=1e-4, rtol=0)
    export(tmp_path / "a", "peft", tmp_path / "peft")
    mine = load_model(ModelSettings(name=model.model_id, device="cpu"))
    opened = PeftModel.from_pretrained(mine.denoiser, tmp_path / "peft" / "transformer")
    torch.testing.assert_close(prediction(model, opened), expected, atol=1e-4, rtol=0)
    for form, said in (
        ("kohya", "take --to diffusers or --to peft"),
        ("official", "--to diffusers, peft or comfyui$"),
    ):
        with pytest.raises(UserError, match=said):
            export(tmp_path / "a", form, tmp_path / form)
        assert not (tmp_path / form).exists()


def test_sdxl_in_the_layout_of_kohya(tiny_models, tmp_path):
    save_comat(tmp_path / "a", tiny_models["sdxl"])
    export(tmp_path / "a", "kohya", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert any(key.startswith("lora_unet_middle_block_1_transformer_blocks") for key in tensors)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_official_file_and_back(tiny_models, family, tmp_path):
    model = tiny_models[family]
    state = save_comat(tmp_path / "a", model)
    report = export(tmp_path / "a", "official", tmp_path / "out")
    assert list(report.written) == [FILE] and "LoRA of rank 2 on" in report.written[FILE]
    assert any("largest difference 0 " in line for line in report.check)
    content, given = load_file(tmp_path / "out" / FILE), official(model.denoiser)
    assert content.keys() == given.keys() and all(torch.equal(content[key], x) for key, x in given.items())
    assert report.notes == [
        "the official keys begin with unet.unet., which diffusers does not read; --to diffusers does it"
    ]
    import_official("comat", tmp_path / "out", model.model_id, tmp_path / "back")
    again = load_adapter(tmp_path / "back")
    assert again.state.keys() == state.keys()
    assert all(torch.equal(again.state[key], x) for key, x in state.items())
    export(tmp_path / "a", "official", tmp_path / "half", dtype="float16")
    assert {x.dtype for x in load_file(tmp_path / "half" / FILE).values()} == {torch.float16}


def test_what_diffusers_got_is_imported_too(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    state = save_comat(tmp_path / "a", model)
    export(tmp_path / "a", "diffusers", tmp_path / "out")
    import_official("comat", tmp_path / "out", model.model_id, tmp_path / "back")
    again = load_adapter(tmp_path / "back").state
    assert again.keys() == state.keys() and all(torch.equal(again[key], x) for key, x in state.items())


def test_refusals(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    state = save_comat(tmp_path / "a", model)
    info = load_adapter(tmp_path / "a").info
    write_adapter(tmp_path / "empty", info, {"x.y": torch.ones(1)})
    broken = {**info.__dict__, "family": "sd21"}
    write_adapter(tmp_path / "sd21", type(info)(**broken), state)
    for name, form, message, options in (
        ("a", "peft", "is LoRA of rank 2 already; leave --rank out", {"rank": 2}),
        ("a", "webui", "unknown export format of comat 'webui'", {}),
        ("a", "peft", "does not fit", {"model": tiny_models["sdxl"].model_id}),
        ("empty", "peft", r"is damaged: it holds no LoRA \(unet", {}),
        ("sd21", "official", "knows Stable Diffusion 1.5 and XL; this adapter is for sd21: export it", {}),
    ):
        before = sorted(Path(tmp_path).iterdir())
        with pytest.raises(UserError, match=message) as caught:
            export(tmp_path / name, form, tmp_path / "out", **options)
        assert "\n" not in str(caught.value) and sorted(Path(tmp_path).iterdir()) == before
