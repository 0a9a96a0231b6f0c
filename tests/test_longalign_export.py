"""Adapters of LongAlign in the formats of other tools: the stages become one LoRA, and the official files."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from longalign_files import save_longalign, text_adapter
from peft import PeftModel
from safetensors.torch import load_file

from align_cli.adapters import import_official, load_adapter, write_adapter
from align_cli.errors import UserError
from align_cli.exporting import export
from align_cli.exporting.compare import outputs
from align_cli.methods.longalign.adapter import TextAdapter
from align_cli.methods.longalign.export import stacked
from align_cli.methods.longalign.lora_file import from_list
from align_cli.models.loading import load_model
from align_cli.models.lora import LoraTuning, change
from align_cli.models.states import LORA_A, by_group
from align_cli.models.tuning import tuning_like
from align_cli.settings import ModelSettings

STAGES = {"align": (), "reward": ("align",), "lcm": ("align",), "reward-lcm": ("align", "lcm")}


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


def prediction(model, denoiser=None) -> torch.Tensor:
    """What the denoiser says, perhaps another one's."""
    with ExitStack() as stack:
        if denoiser is not None:
            stack.enter_context(model.using(denoiser=denoiser))
        return outputs(model, denoiser=True).prediction


def stages_at_work(model, state) -> torch.Tensor:
    """What it says with the LoRA of each stage merged, one upon the other."""
    with ExitStack() as stack:
        for name, part in by_group(state).items():
            if name != "adapter":
                tuning = tuning_like(model.denoiser, part)
                assert isinstance(tuning, LoraTuning)
                tuning.load_state(part)
                stack.enter_context(tuning.merged())
        return prediction(model)


@pytest.mark.slow
def test_the_libraries_open_all_stages_as_one(model, tmp_path):
    state = save_longalign(tmp_path / "a", model, "reward-lcm", ("align", "lcm"))
    expected, plain = stages_at_work(model, state), prediction(model)
    assert (expected - plain).abs().max() > 0.05
    for form, file in (("diffusers", "pytorch_lora_weights.safetensors"), ("kohya", "lora.safetensors")):
        report = export(tmp_path / "a", form, tmp_path / form)
        assert set(report.written) == {file, "adapter/"}
        assert "rank 9, 65 layers" in report.written[file]
        assert report.notes[0].startswith("t2ialign reads captions sentence by sentence")
        assert report.notes[1] == (
            "the LoRAs of all stages are one here, whose rank is their sum: "
            "align (3), lcm (2), reward-lcm (4)"
        )
        pipe = StableDiffusionPipeline.from_pretrained(model.model_id)
        pipe.load_lora_weights(tmp_path / form, weight_name=file)
        torch.testing.assert_close(prediction(model, pipe.unet), expected, atol=1e-4, rtol=0)
    export(tmp_path / "a", "peft", tmp_path / "peft")
    said = json.loads((tmp_path / "peft" / "unet" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == 9 and len(said["target_modules"]) == 65
    mine = load_model(ModelSettings(name=model.model_id, device="cpu"))
    opened = PeftModel.from_pretrained(mine.denoiser, tmp_path / "peft" / "unet")
    torch.testing.assert_close(prediction(model, opened), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(prediction(model, opened.merge_and_unload()), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_text_adapter_lies_beside(model, tmp_path):
    save_longalign(tmp_path / "a", model)
    save_longalign(tmp_path / "clip", model, adapter=False)
    export(tmp_path / "a", "peft", tmp_path / "out", dtype="float16")
    opened, given = TextAdapter.from_folder(tmp_path / "out" / "adapter").state_dict(), text_adapter()
    assert all(torch.equal(opened[key], value) for key, value in given.state_dict().items())
    assert json.loads((tmp_path / "out" / "adapter" / "config.json").read_text())["int_dim"] == 10
    report = export(tmp_path / "clip", "diffusers", tmp_path / "out2")
    assert list(report.written) == ["pytorch_lora_weights.safetensors"] and "T5" not in report.notes[0]
    assert len(report.notes) == 1


def test_stacking_is_exact(model):
    state = {"a": torch.randn(3, 4), "b": torch.randn(5, 3)}
    conv = {"a": torch.randn(2, 4, 3, 3), "b": torch.randn(5, 2, 1, 1)}
    for pair in (state, conv):
        lora = {f"x{LORA_A}": pair["a"], "x.lora_B.weight": pair["b"]}
        other = {f"x{LORA_A}": pair["a"].flip(0)[:1], "x.lora_B.weight": 2 * pair["b"][:, :1]}
        both = stacked([lora, other])
        sums = sum(change(part[f"x{LORA_A}"], part["x.lora_B.weight"]) for part in (lora, other))
        torch.testing.assert_close(change(both[f"x{LORA_A}"], both["x.lora_B.weight"]), sums)
    assert both[f"x{LORA_A}"].shape == (3, 4, 3, 3) and both["x.lora_B.weight"].shape == (5, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_official_files_and_back(model, tmp_path, stage):
    state = save_longalign(tmp_path / "a", model, stage, STAGES[stage])
    report = export(tmp_path / "a", "official", tmp_path / "out")
    own = {"align": "lora_vis.pt"}.get(stage, f"{stage}.pt")
    names = {"adapter/", own, *({"align": "lora_vis.pt"}.get(s, f"{s}.pt") for s in STAGES[stage])}
    assert set(report.written) == names
    assert {p.name for p in (tmp_path / "out").iterdir()} == {name.rstrip("/") for name in names}
    assert any("largest difference 0 " in line for line in report.check)
    import_official("longalign", tmp_path / "out", model.model_id, tmp_path / "back")
    again = load_adapter(tmp_path / "back")
    assert again.info.stage == stage and again.state.keys() == state.keys()
    assert all(torch.equal(again.state[key], state[key]) for key in state)


def test_official_files_in_half_precision(model, tmp_path):
    state = save_longalign(tmp_path / "a", model)
    report = export(tmp_path / "a", "official", tmp_path / "out", dtype="float16")
    content = torch.load(tmp_path / "out" / "lora_vis.pt", weights_only=True)
    assert type(content) is list and {x.dtype for x in content} == {torch.float16}
    back = from_list(content, model.denoiser, "file")
    assert all(torch.equal(back[key], state[f"unet.{key}"].half().float()) for key in back)
    assert report.notes == []


@pytest.mark.slow
def test_sdxl_in_the_layout_of_kohya(tiny_models, tmp_path):
    model = tiny_models["sdxl"]
    save_longalign(tmp_path / "a", model, "reward", ("align",), adapter=False)
    export(tmp_path / "a", "kohya", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert tensors["lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight"].shape == (5, 8, 3, 3)
    assert "lora_unet_middle_block_2_emb_layers_1.alpha" in tensors


@pytest.mark.slow
def test_refusals(model, tiny_models, tmp_path):
    save_longalign(tmp_path / "a", model)
    save_longalign(tmp_path / "clip", model, adapter=False)
    save_longalign(tmp_path / "chain", model, "lcm", ("align", "reward"))
    adapter = load_adapter(tmp_path / "a")
    text = {key: x for key, x in adapter.state.items() if key.startswith("adapter.")}
    write_adapter(tmp_path / "empty", adapter.info, text)
    save_longalign(tmp_path / "xl", tiny_models["sdxl"], adapter=False)
    for name, form, message, options in (
        ("a", "peft", "is LoRA of rank 3 already; leave --rank out", {"rank": 2}),
        ("a", "webui", "unknown export format of longalign 'webui'", {}),
        ("a", "peft", "the unet of the adapter does not fit", {"model": tiny_models["sdxl"].model_id}),
        ("clip", "official", "reads T5 through a text adapter, and this adapter was trained without", {}),
        ("chain", "official", "has stage lcm on align, here it is on align and reward: export it with", {}),
        ("empty", "peft", r"is damaged: it holds no LoRA of its own stage \(unet", {}),
        ("xl", "official", "knows Stable Diffusion 1.x and 2.x; this adapter is for sdxl", {}),
    ):
        before = sorted(Path(tmp_path).iterdir())
        with pytest.raises(UserError, match=message) as caught:
            export(tmp_path / name, form, tmp_path / "out", **options)
        assert "\n" not in str(caught.value) and sorted(Path(tmp_path).iterdir()) == before
