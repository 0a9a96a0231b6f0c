"""Adapters in the formats of other tools: opened by the very libraries, they do what the adapter does."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
from softrepa_helpers import save_random_adapter
from textcraftor_files import save_tuned
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

from align_cli.adapters import attach, import_official, load_adapter, write_adapter
from align_cli.cli.main import app
from align_cli.errors import UserError
from align_cli.exporting import Part, export, lora, pipelines
from align_cli.exporting.compare import outputs
from align_cli.exporting.kohya import kohya_name, sgm_path
from align_cli.exporting.lowrank import factors, low_rank
from align_cli.models.base import BaseModel
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings

LORA = {"lora_rank": 3, "lora_alpha": 5.0}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
ENCODERS = ("text_encoder", "text_encoder_2")


def fresh(model: BaseModel) -> BaseModel:
    """The same base model, loaded anew: libraries put their layers into it."""
    return load_model(ModelSettings(name=model.model_id, device="cpu"))


def at_work(model: BaseModel, adapter: Path):
    """What the model says with the adapter at work in all steps."""
    with attach(model, [str(adapter)]):
        return outputs(model, denoiser=True)


def assert_close(got, expected, atol: float) -> None:
    for name in ("tokens", "pooled", "prediction"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=atol, rtol=0)


def assert_refused(message: str, *args: object, **options: object) -> None:
    """A `UserError` of one line that leaves nothing behind."""
    out = Path(str(args[2]))
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        export(*args, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


# ---------------------------------------------------------------- all weights


def test_a_text_encoder_and_a_unet_for_a_pipeline(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    method = save_tuned(tmp_path / "a", model, stage="joint")
    report = export(tmp_path / "a", "diffusers", tmp_path / "out")
    assert list(report.written) == ["text_encoder", "unet"]
    assert all("largest difference 0 " in line for line in report.check) and len(report.check) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    pipe = StableDiffusionPipeline.from_pretrained(
        model.model_id,
        text_encoder=CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet"),
    )
    for part, opened in (("text_encoder", pipe.text_encoder), ("unet", pipe.unet)):
        trained = method.tunings[part].state()
        mine = dict(opened.named_parameters())
        assert all(torch.equal(mine[key], value) for key, value in trained.items())
    expected = at_work(model, tmp_path / "a")
    same_layout = pipe.unet.to(memory_format=torch.channels_last)  # as the base model's: to the bit
    with model.using(denoiser=same_layout, encoders={0: pipe.text_encoder}):
        assert_close(outputs(model, denoiser=True), expected, 0.0)
    picture = pipe("a red circle", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(picture)).all()


def test_the_file_has_the_keys_that_every_transformers_reads(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "a", model)
    export(tmp_path / "a", "diffusers", tmp_path / "out")
    keys = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors").keys()
    live = dict(model.encoders[0].named_parameters()).keys()
    assert keys == {f"text_model.{key.removeprefix('text_model.')}" for key in live}
    content = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert content["architectures"] == ["CLIPTextModel"] and content["dtype"] == "float32"


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_all_weights_of_the_other_families(tiny_models, tmp_path, family):
    model = tiny_models[family]
    save_tuned(tmp_path / "a", model, stage="joint")
    export(tmp_path / "a", "diffusers", tmp_path / "out")
    expected = at_work(model, tmp_path / "a")
    first = CLIPTextModel if family == "sdxl" else CLIPTextModelWithProjection
    opened = {
        0: first.from_pretrained(tmp_path / "out" / "text_encoder"),
        1: CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder_2"),
    }
    name = "transformer" if family == "sd3" else "unet"
    denoiser = type(model.denoiser).from_pretrained(tmp_path / "out" / name)
    with model.using(denoiser=denoiser.to(memory_format=torch.channels_last), encoders=opened):
        assert_close(outputs(model, denoiser=True), expected, 0.0)


def test_half_precision_is_rounding_and_says_so(tiny_models, tmp_path):
    method = save_tuned(tmp_path / "a", tiny_models["sd15"])
    report = export(tmp_path / "a", "diffusers", tmp_path / "out", dtype="float16")
    opened = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    assert opened.dtype == torch.float16
    trained = method.tunings["text_encoder"].state()
    assert all(torch.equal(p, trained[key].half()) for key, p in opened.named_parameters())
    assert "largest difference 0 " not in report.check[0]


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize("family", list(PIPELINES))
def test_lora_in_a_pipeline_of_diffusers(tiny_models, tmp_path, family):
    model = tiny_models[family]
    save_tuned(tmp_path / "a", model, stage="joint", **LORA)
    expected = at_work(model, tmp_path / "a")
    report = export(tmp_path / "a", "diffusers", tmp_path / "out")
    assert list(report.written) == ["pytorch_lora_weights.safetensors"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(model.model_id)
    pipe.load_lora_weights(tmp_path / "out")
    opened = {i: getattr(pipe, name) for i, name in enumerate(ENCODERS) if hasattr(pipe, name)}
    with model.using(denoiser=pipe.transformer if family == "sd3" else pipe.unet, encoders=opened):
        assert_close(outputs(model, denoiser=True), expected, 1e-4)
    plain = outputs(model, denoiser=True)
    assert (plain.prediction - expected.prediction).abs().max() > 5e-3
    assert (plain.tokens - expected.tokens).abs().max() > 1e-2


def test_lora_of_peft(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "a", model, stage="joint", **LORA)
    expected = at_work(model, tmp_path / "a")
    export(tmp_path / "a", "peft", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "text_encoder" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["peft_type"]) == (3, 5, "LORA")
    mine = fresh(model)
    opened = PeftModel.from_pretrained(mine.encoders[0], tmp_path / "out" / "text_encoder")
    unet = PeftModel.from_pretrained(mine.denoiser, tmp_path / "out" / "unet")
    with model.using(denoiser=unet, encoders={0: opened}):
        assert_close(outputs(model, denoiser=True), expected, 1e-5)
    merged = opened.merge_and_unload()
    with model.using(denoiser=unet.merge_and_unload(), encoders={0: merged}):
        assert_close(outputs(model, denoiser=True), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_lora_in_the_layout_of_kohya(tiny_models, tmp_path, family):
    model = tiny_models[family]
    save_tuned(tmp_path / "a", model, stage="joint", **LORA)
    expected = at_work(model, tmp_path / "a")
    report = export(tmp_path / "a", "kohya", tmp_path / "out")
    assert list(report.written) == [p.name for p in (tmp_path / "out").iterdir()] == ["lora.safetensors"]
    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(model.model_id)
    pipe.load_lora_weights(tmp_path / "out", weight_name="lora.safetensors")
    opened = {i: getattr(pipe, name) for i, name in enumerate(ENCODERS) if hasattr(pipe, name)}
    with model.using(denoiser=pipe.unet, encoders=opened):
        assert_close(outputs(model, denoiser=True), expected, 1e-4)


@pytest.mark.slow
def test_names_of_kohya(tiny_models, tmp_path):
    save_tuned(tmp_path / "sd15", tiny_models["sd15"], stage="joint", **LORA)
    export(tmp_path / "sd15", "kohya", tmp_path / "1", dtype="float16")
    tensors = load_file(tmp_path / "1" / "lora.safetensors")
    state = load_adapter(tmp_path / "sd15").state
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert torch.equal(tensors[f"{name}.lora_down.weight"], state[f"{layer}.lora_A.weight"].half())
    assert torch.equal(tensors[f"{name}.lora_up.weight"], state[f"{layer}.lora_B.weight"].half())
    assert float(tensors[f"{name}.alpha"]) == 5.0
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    assert len(tensors) == len(state) * 3 // 2
    save_tuned(tmp_path / "sdxl", tiny_models["sdxl"], stage="joint", **LORA)
    export(tmp_path / "sdxl", "kohya", tmp_path / "2")
    heads = {key.partition(".")[0] for key in load_file(tmp_path / "2" / "lora.safetensors")}
    assert {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_v",
    } <= heads


def test_every_layer_of_sdxl_has_its_name_of_the_original_code(tiny_models):
    """As diffusers reads them, all residual blocks, attentions and embeddings of a UNet."""
    unet = tiny_models["sdxl"].denoiser
    layers = [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and "samplers" not in name
    ]
    layers = [name for name in layers if name not in ("conv_in", "conv_out")]
    tensors = {}
    for i, name in enumerate(layers):
        key = kohya_name("sdxl", "unet", name, unet)
        tensors |= {f"{key}.lora_{x}.weight": torch.full((1, 1), float(i)) for x in ("up", "down")}
    assert len(tensors) == 2 * len(layers)
    found = diffusers.StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)[0]
    back = {key.replace("attn1.processor", "attn1").replace("attn2.processor", "attn2") for key in found}
    for i, name in enumerate(layers):
        ends = [f"unet.{name}.lora.up.weight", f"unet.{name.removesuffix('.0')}_lora.up.weight"]
        assert any(end in back for end in ends), name
        mine = next(v for k, v in found.items() if k.replace(".processor", "") in ends)
        assert float(mine) == i
    for name in ("down_blocks.0.downsamplers.0.conv", "conv_in", "mid_block.other.0.x"):
        with pytest.raises(UserError, match=f"no name for the layer {name}"):
            sgm_path(name, 1)


@pytest.mark.slow
def test_all_weights_in_the_layout_of_kohya(tiny_models, tmp_path):
    for family in ("sd15", "sdxl"):
        save_tuned(tmp_path / family, tiny_models[family], stage="joint")
        report = export(tmp_path / family, "kohya", tmp_path / f"{family}-out", rank=64)
        assert max(report.left_out.values()) < 1e-5
    save_tuned(tmp_path / "sd3", tiny_models["sd3"], **LORA)
    assert_refused("kohya's layout of SD3 has query, key", tmp_path / "sd3", "kohya", tmp_path / "x")


def test_lora_of_the_embedded_model(tmp_path):
    model = load_model(ModelSettings(name="tiny-sd15", device="cpu"))
    save_tuned(tmp_path / "a", model, **LORA)
    for form in ("peft", "diffusers", "kohya"):
        report = export(tmp_path / "a", form, tmp_path / form)
        assert "text embedding" in report.check[1]


def test_a_text_encoder_that_the_stage_unet_carries(tiny_models, tmp_path):
    """All weights of the encoder as a folder, LoRA of the UNet as a file, in one export."""
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "text", model)
    method = save_tuned(tmp_path / "unet", model, 1, stage="unet", **LORA)
    both = load_adapter(tmp_path / "text").state | method.state()
    write_adapter(tmp_path / "both", load_adapter(tmp_path / "unet").info, both)
    report = export(tmp_path / "both", "diffusers", tmp_path / "out")
    assert list(report.written) == ["text_encoder", "pytorch_lora_weights.safetensors"]
    pipe = StableDiffusionPipeline.from_pretrained(
        model.model_id, text_encoder=CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    )
    pipe.load_lora_weights(tmp_path / "out")
    with model.using(denoiser=pipe.unet, encoders={0: pipe.text_encoder}):
        opened = outputs(model, denoiser=True)
    assert_close(opened, at_work(model, tmp_path / "both"), 1e-4)


# ---------------------------------------------------------------- all weights as LoRA


def test_factors_by_hand():
    a, b = factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    torch.testing.assert_close(a @ a.T, torch.diag(torch.tensor([3.0, 2.0])))  # shared evenly
    column, row = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0, -1.0]])
    a, b = factors(column @ row, 5)  # ranks that do not exist are zeros
    assert a.shape == (5, 3) and b.shape == (2, 5)
    torch.testing.assert_close(b @ a, column @ row)
    assert not a[2:].any() and not b[:, 2:].any()


def test_what_a_rank_leaves_out():
    base = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    state = {name: p.detach().clone() for name, p in base.named_parameters()}
    state["0.weight"] += torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    state["1.bias"] += torch.tensor([0.0, 2.0, 0.0])
    part, left, lines = low_rank(Part("text_encoder", state), base, 2)
    assert part.layers == ["0"] and part.rank == 2 and part.factor == 1
    assert left == {"text_encoder.0": pytest.approx(1 / 14**0.5, rel=1e-5)}  # 1 of 9 + 4 + 1
    assert lines[0].startswith(f"text_encoder: rank 2 leaves out {1 / 14**0.5:.2%} of the change of 1 linear")
    whole = (5 / 18) ** 0.5  # 1 + 4 of 14 + 4
    assert lines[1] == (
        f"text_encoder: not contained: 1 x bias of LayerNorm; with them {whole:.2%} of the whole change is "
        "left out"
    )
    same = {name: p.detach().clone() for name, p in base.named_parameters()}
    with pytest.raises(UserError, match="no linear layer of the text_encoder differs"):
        low_rank(Part("text_encoder", same), base, 2)
    with pytest.raises(UserError, match=r"does not fit the base model: missing 2\.bias"):
        low_rank(Part("text_encoder", {k: v for k, v in same.items() if k != "2.bias"}), base, 2)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_full_rank_of_linear_layers_leaves_out_nothing(tiny_models, tmp_path, form):
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "a", model)
    adapter = load_adapter(tmp_path / "a")
    own = dict(model.encoders[0].named_parameters())
    linear = {f"{n}.weight" for n, m in model.encoders[0].named_modules() if isinstance(m, nn.Linear)}
    state = {
        key: value if (name := key.removeprefix("text_encoder.")) in linear else own[name]
        for key, value in adapter.state.items()
    }
    write_adapter(tmp_path / "linear", adapter.info, state)
    report = export(tmp_path / "linear", form, tmp_path / "out", rank=32)
    assert len(report.left_out) == len(linear) == 12
    assert max(report.left_out.values()) < 1e-5
    assert "0.00% of the change of 12 linear layers" in report.notes[0]
    assert not any("not contained" in note for note in report.notes)
    expected = at_work(model, tmp_path / "linear").tokens
    mine = fresh(model)
    if form == "peft":
        PeftModel.from_pretrained(mine.encoders[0], tmp_path / "out" / "text_encoder")
    else:
        pipe = StableDiffusionPipeline.from_pretrained(model.model_id)
        pipe.load_lora_weights(tmp_path / "out")
        mine.encoders[0] = pipe.text_encoder
    torch.testing.assert_close(outputs(mine, denoiser=False).tokens, expected, atol=1e-4, rtol=0)


def test_a_low_rank_says_what_is_lost(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    method = save_tuned(tmp_path / "a", model)
    report = export(tmp_path / "a", "peft", tmp_path / "out", rank=2)
    own = dict(model.encoders[0].named_parameters())
    trained = method.tunings["text_encoder"].state()
    tensors = load_file(tmp_path / "out" / "text_encoder" / "adapter_model.safetensors")
    for key, share in report.left_out.items():
        layer = key.removeprefix("text_encoder.")
        change = trained[f"{layer}.weight"] - own[f"{layer}.weight"]
        a, b = (tensors[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        values = torch.linalg.svdvals(change)
        assert share == pytest.approx(float((change - b @ a).norm() / change.norm()), rel=1e-4)
        assert share == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert len(report.left_out) == 12
    notes = " ".join(report.notes)
    assert "embeddings.token_embedding.weight" in notes and "12 x bias of Linear" in notes
    assert "5 x weight of LayerNorm" in notes
    assert report.check[1].startswith("at work: the text embedding differs from the adapter's by at most ")


# ---------------------------------------------------------------- the official files


def test_official_files_and_back(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "a", model, stage="joint")
    report = export(tmp_path / "a", "official", tmp_path / "out")
    assert sorted(report.written) == ["tc_text.pth", "tc_unet.pth"]
    text = torch.load(tmp_path / "out" / "tc_text.pth", weights_only=True)
    assert all(key.startswith("module.text_model.") for key in text)
    # as the official test scripts load it: 7 characters off, into a class with or without the level
    with_level = CLIPTextModelWithProjection(copy.deepcopy(model.encoders[0].config))
    found = with_level.load_state_dict({key[7:]: value for key, value in text.items()}, strict=False)
    assert found.missing_keys == ["text_projection.weight"] and not found.unexpected_keys
    unet = torch.load(tmp_path / "out" / "tc_unet.pth", weights_only=True)
    copy.deepcopy(model.denoiser).load_state_dict({key[7:]: value for key, value in unet.items()})
    import_official("textcraftor", tmp_path / "out", model.model_id, tmp_path / "back")
    first, again = load_adapter(tmp_path / "a").state, load_adapter(tmp_path / "back").state
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


# ---------------------------------------------------------------- words and refusals


def test_steps_that_no_format_knows(tiny_models, tmp_path):
    model = tiny_models["sd15"]
    save_tuned(tmp_path / "late", model)
    save_tuned(tmp_path / "always", model, test_grad_steps=30)
    save_tuned(tmp_path / "unet", model, stage="unet")
    (note,) = export(tmp_path / "late", "official", tmp_path / "1").notes
    assert note.startswith("t2ialign uses the tuned text encoder from step 15 of 30 on")
    assert export(tmp_path / "always", "official", tmp_path / "2").notes == []
    assert export(tmp_path / "unet", "official", tmp_path / "3").notes == []


def test_the_command(tiny_models, tmp_path):
    save_tuned(tmp_path / "a", tiny_models["sd15"])

    def call(*args: object):
        return CliRunner().invoke(app, ["adapters", "export", *map(str, args)])

    result = call(tmp_path / "a", "--to", "peft", "--rank", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    kinds = [line.split()[0] for line in result.stdout.splitlines()]
    assert kinds == ["wrote"] + ["left"] * 12 + ["used", "unused"] + ["note:"] * 3 + ["check:"] * 2
    assert f"wrote {tmp_path / 'out' / 'text_encoder'}: LoRA of rank 2 on 12 layers" in result.stdout
    for args, message in (
        (("--to", "peft", "--rank", 2, "--out", tmp_path / "out"), "out exists already"),
        (("--to", "pfet", "--out", tmp_path / "x"), "unknown export format of textcraftor 'pfet'; did you"),
        (("--to", "peft", "--rank", 0, "--out", tmp_path / "x"), "--rank"),
    ):
        result = call(tmp_path / "a", *args)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert message in result.stderr


def test_refusals(tiny_models, make_tiny_sd15, tmp_path):
    model, out = tiny_models["sd15"], tmp_path / "out"
    save_tuned(tmp_path / "full", model)
    save_tuned(tmp_path / "lora", model, **LORA)
    save_tuned(tmp_path / "xl", tiny_models["sdxl"])
    assert_refused("a PEFT folder holds LoRA: name a rank", tmp_path / "full", "peft", out)
    assert_refused("is LoRA of rank 3 already; leave --rank out", tmp_path / "lora", "peft", out, rank=2)
    assert_refused("hold all weights, not LoRA", tmp_path / "lora", "official", out)
    assert_refused("hold all weights, not LoRA", tmp_path / "full", "official", out, rank=2)
    assert_refused("are float32; leave --dtype out", tmp_path / "full", "official", out, dtype="float16")
    assert_refused("is for sdxl and holds a text_encoder_2", tmp_path / "xl", "official", out)
    assert_refused("a kohya file holds LoRA: name a rank", tmp_path / "full", "kohya", out)
    assert_refused("unknown export format", tmp_path / "full", "webui", out)
    assert_refused("--dtype must be one of", tmp_path / "full", "diffusers", out, dtype="int8")
    assert_refused("unknown model 'sd51'", tmp_path / "full", "diffusers", out, model="sd51")
    assert_refused("does not exist", tmp_path / "none", "diffusers", out)
    wide = make_tiny_sd15(tmp_path / "wide", width=64)
    assert_refused(r"does not fit .*wide: .* has shape", tmp_path / "full", "diffusers", out, model=str(wide))
    assert_refused(
        "family sd15.* does not fit|holds a text_encoder", tmp_path / "lora", "peft", out,
        model=tiny_models["sdxl"].model_id,
    )  # fmt: skip
    soft = save_random_adapter(tmp_path / "soft", Path(model.model_id))
    assert_refused("adapters of softrepa cannot be exported", soft, "diffusers", out)


def test_t5_has_no_lora_in_diffusers(tiny_models, tmp_path):
    model = tiny_models["sd3"]
    save_tuned(tmp_path / "a", model, encoders=["text_encoder_3"])
    assert_refused("takes no LoRA for text_encoder_3", tmp_path / "a", "diffusers", tmp_path / "x", rank=2)
    expected = at_work(model, tmp_path / "a").tokens
    report = export(tmp_path / "a", "peft", tmp_path / "lora", rank=48)
    assert all(key.startswith("text_encoder_3.") for key in report.left_out)
    export(tmp_path / "a", "diffusers", tmp_path / "out")
    opened = type(model.encoders[2]).from_pretrained(tmp_path / "out" / "text_encoder_3")
    with model.using(encoders={2: opened}):
        assert torch.equal(outputs(model, denoiser=False).tokens, expected)


def test_an_export_that_holds_something_else_is_not_kept(tiny_models, tmp_path, monkeypatch):
    save_tuned(tmp_path / "a", tiny_models["sd15"])
    save_tuned(tmp_path / "lora", tiny_models["sd15"], **LORA)
    real = pipelines.filled

    def spoilt(job, part):
        module = real(job, part)
        weight = next(module.parameters())
        weight.data = weight.data + 1e-3
        return module

    monkeypatch.setattr(pipelines, "filled", spoilt)
    assert_refused("does not hold what was trained, so nothing", tmp_path / "a", "diffusers", tmp_path / "x")
    monkeypatch.setattr(lora, "cast", lambda state, _: {key: 2 * x for key, x in state.items()})
    assert_refused("does not hold what was trained, so nothing", tmp_path / "lora", "peft", tmp_path / "x")


def test_a_full_disk(tiny_models, tmp_path, monkeypatch):
    save_tuned(tmp_path / "a", tiny_models["sd15"])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert_refused("cannot write tc_text.pth: the disk is full", tmp_path / "a", "official", tmp_path / "x")
