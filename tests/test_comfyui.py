"""Adapters for ComfyUI: its names of layers, files that hold what was trained, every key accounted for."""

from __future__ import annotations

import pytest
import torch
from cli_helpers import ok
from model_helpers import sdxl_unet
from pipeline_files import CASES, save_any
from safetensors.torch import load_file, save_file
from textcraftor_files import save_tuned

from align_cli.adapters import load_adapter
from align_cli.errors import UserError
from align_cli.exporting import EXPORTERS, comfyui, export
from align_cli.exporting.comfyui import comfy_keys
from align_cli.exporting.kohya import FILE
from align_cli.models.lora import change
from align_cli.models.states import LORA_A, LORA_B

EXPORTED = [case for case in CASES if case[0] != "softrepa"]
OFFICIAL = [("textcraftor", "sd15"), ("longalign", "sd15"), ("dpt", "sd15"), ("comat", "sd15"),
            ("comat", "sdxl")]  # fmt: skip
FORMS = ("diffusers", "peft", "kohya", "comfyui", "official")


def written(folder, family: str, part: str, module) -> dict[str, torch.Tensor]:
    """Layer -> change of its weight, of a LoRA file read by ComfyUI's names."""
    tensors = load_file(folder / FILE)
    found = {}
    for name, layer in comfy_keys(family, part, module):
        if f"{name}.lora_up.weight" in tensors:
            a, b = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            found[layer] = change(a, b) * (tensors[f"{name}.alpha"] / len(a))
    return found


@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "family"), EXPORTED)
def test_every_key_is_accounted_for(tiny_models, tiny_sd3_folder, tmp_path, method, family, form):
    model = tiny_models[family]
    options = {"lora_rank": 2} if method == "textcraftor" and form != "official" else {}
    spec = save_any(tmp_path / "a", method, model, tiny_sd3_folder, **options)
    keys = load_adapter(spec).state.keys()
    if (form, family) == ("kohya", "sd3") or (form == "official" and (method, family) not in OFFICIAL):
        with pytest.raises(UserError, match="export it with --to|take --to diffusers"):
            export(spec, form, tmp_path / "out")
        return
    report = export(spec, form, tmp_path / "out")
    assert report.used.keys() == keys and not report.unused
    names = {"official files"} if form == "official" else {key.partition(".")[0] for key in keys}
    if form != "official" and method == "dpt":
        names = {model.denoiser_part, "discriminator.safetensors"}
    if form != "official" and method == "longalign":
        names = {"unet"} | ({"adapter/"} if family == "sd15" else set())
    assert set(report.used.values()) == names
    for where in names & set(report.layers):
        assert report.layers[where]


@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize(("method", "family"), [case for case in EXPORTED if case[0] in ("comat", "dpt")])
def test_the_lora_of_a_denoiser_comes_back(tiny_models, tmp_path, method, family):
    model = tiny_models[family]
    spec = save_any(tmp_path / "a", method, model, "")
    report = export(spec, "comfyui", tmp_path / "out")
    assert "read as ComfyUI does" in report.check[0] and "models/loras" in report.written[FILE]
    part = model.denoiser_part
    state = {key.removeprefix(f"{part}."): x for key, x in load_adapter(spec).state.items()}
    found = written(tmp_path / "out", family, part, model.denoiser)
    layers = [key.removesuffix(LORA_A) for key in state if key.endswith(LORA_A)]
    assert sorted(found) == sorted(layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], change(state[layer + LORA_A], state[layer + LORA_B]))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_lora_of_text_encoders_and_denoiser(tiny_models, tmp_path, family):
    model = tiny_models[family]
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"][: len(model.encoders)]
    options = {"lora_rank": 3, "lora_alpha": 5.0, "stage": "joint", "encoders": tuple(encoders)}
    save_tuned(tmp_path / "a", model, **options)
    report = export(tmp_path / "a", "comfyui", tmp_path / "out")
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "out" / FILE)}
    starts = {
        "sd15": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_down_blocks"),
        "sdxl": ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_input_blocks"),
        "sd3": ("lora_te3_encoder_block_0_layer_0_SelfAttention_q",
                "lora_transformer_transformer_blocks_0_attn_to_q"),
    }[family]  # fmt: skip
    assert all(any(key.startswith(start) for key in keys) for start in starts)
    state = load_adapter(tmp_path / "a").state
    modules = dict(zip(encoders, model.encoders, strict=True))
    modules["transformer" if family == "sd3" else "unet"] = model.denoiser
    for part, module in modules.items():
        found = written(tmp_path / "out", family, part, module)
        assert sorted(found) == sorted(report.layers[part])
        for layer, moved in found.items():
            a, b = (state[f"{part}.{layer}{end}"] for end in (LORA_A, LORA_B))
            torch.testing.assert_close(moved, change(a, b) * (5 / 3))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_whole_modules(tiny_models, tmp_path, family):
    model = tiny_models[family]
    save_tuned(tmp_path / "a", model, stage="joint")
    report = export(tmp_path / "a", "comfyui", tmp_path / "out")
    denoiser = "transformer" if family == "sd3" else "unet"
    text = load_file(tmp_path / "out" / "text_encoders" / "text_encoder.safetensors")
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in text  # what ComfyUI tells CLIP-L by
    held = load_file(tmp_path / "out" / "diffusion_models" / f"{denoiser}.safetensors")
    assert held.keys() == model.denoiser.state_dict().keys()
    for key, value in load_adapter(tmp_path / "a").state.items():
        part, _, name = key.partition(".")
        if part == denoiser:
            assert torch.equal(held[name], value)
        elif part == "text_encoder":
            assert torch.equal(text[name if name in text else f"text_model.{name}"], value)
    assert all("largest difference 0 " in line for line in report.check)
    assert any("CLIPLoader" in said for said in report.written.values())


def test_whole_weights_as_lora_tell_what_is_left_out(tiny_models, tmp_path):
    save_tuned(tmp_path / "a", tiny_models["sd15"])
    said = ok("adapters", "export", tmp_path / "a", "--to", "comfyui", "--out", tmp_path / "b", "--rank", 4)
    assert "LoRA holds changed weights of linear layers alone" in said.stdout
    report = export(tmp_path / "a", "comfyui", tmp_path / "out", rank=4)
    keys = load_adapter(tmp_path / "a").state.keys()
    assert report.used.keys() | report.unused.keys() == keys and not report.used.keys() & report.unused.keys()
    assert all(key.endswith(".weight") for key in report.used)
    assert "text_encoder.embeddings.token_embedding.weight" in {
        key.replace("text_model.", "") for key in report.unused
    }
    rows = report.table()
    assert [row[0] for row in rows] == ["used", "unused"]
    assert sum(int(row[1].split()[0]) for row in rows) == len(keys)


def test_a_key_that_comfyui_does_not_read(tiny_models, tmp_path, monkeypatch):
    save_any(tmp_path / "a", "comat", tiny_models["sd15"], "")

    def misspelt(*args: object) -> str:
        said = real(*args)
        file = args[0].folder / FILE
        tensors = load_file(file)
        tensors["lora_unet_nowhere.alpha"] = torch.tensor(1.0)
        save_file(tensors, file)
        return said

    real = comfyui.save_kohya
    monkeypatch.setattr(comfyui, "save_kohya", misspelt)
    with pytest.raises(UserError, match="ComfyUI has no name for 1 keys .*first lora_unet_nowhere"):
        export(tmp_path / "a", "comfyui", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_sdxl_by_its_published_layout():
    """Names that SDXL LoRAs in the wild have."""
    found = dict(comfy_keys("sdxl", "unet", sdxl_unet()))
    known = {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k":
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "lora_unet_input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj":
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_out_0":
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
        "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
        "lora_unet_input_blocks_0_0": "conv_in", "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
    }  # fmt: skip
    assert {name: found[name] for name in known} == known


def test_every_exported_method_has_the_format():
    assert all("comfyui" in table for table in EXPORTERS.values())
