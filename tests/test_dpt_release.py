"""The official DPT checkpoint: its keys, what its shapes tell, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from dpt_files import SMALL, lora, official, official_lora
from safetensors.torch import save_file

from align_cli import config
from align_cli.adapters import import_official, load_adapter
from align_cli.errors import UserError
from align_cli.methods.dpt.method import block_channels
from align_cli.methods.dpt.release import official_key, own_key, read_state
from align_cli.models.lora import UNET_ATTENTION, lora_layers
from align_cli.models.parts import outline
from align_cli.models.states import by_group


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


@pytest.fixture
def tuned(model) -> dict[str, torch.Tensor]:
    """The content of an official file of stage 2 for the tiny model."""
    return official() | official_lora(model.denoiser)


def assert_refused(message: str, path: Path, model: str) -> None:
    """One line, and nothing is written."""
    with pytest.raises(UserError, match=message) as caught:
        import_official("dpt", path, model, path.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()


def test_the_lora_of_the_published_models_by_its_size():
    """The parameters that were counted in the official code, rank 4; 128 layers; and the feature up1."""
    for name, width, count in (("sd15", 768, 797_184), ("sd21", 1024, 829_952)):
        unet = outline("sd15", "unet") if name == "sd15" else _sd21_unet(width)
        layers = lora_layers(unet, UNET_ATTENTION)
        assert len(layers) == 128
        assert sum(4 * sum(layer.weight.shape) for layer in layers.values()) == count
        assert list(block_channels(unet).values()) == [320, 640, *[1280] * 5, 640, 320]


def _sd21_unet(width: int) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            cross_attention_dim=width, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )


def test_keys_both_ways():
    prefix = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pairs = {
        f"unet.{prefix}.processor.to_q_lora.down.weight": f"unet.{prefix}.to_q.lora_A.weight",
        f"unet.{prefix}.processor.to_out_lora.up.weight": f"unet.{prefix}.to_out.0.lora_B.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora.up.weight":
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_B.weight",
        "transformer.encoder.layers.0.self_attn.in_proj_weight":
            "discriminator.transformer.encoder.layers.0.self_attn.in_proj_weight",
        "logit_scale": "discriminator.logit_scale",
    }  # fmt: skip
    for theirs, ours in pairs.items():
        assert own_key(theirs) == ours and official_key(ours) == theirs
    assert own_key("unet.conv_in.weight") is None and own_key("text_encoder.pooler.dense.weight") is None


def test_a_tuned_checkpoint(model, tuned, tmp_path):
    folder = tmp_path / "checkpoint-4800"
    folder.mkdir()
    torch.save(tuned, folder / "pytorch_model.bin")
    (folder / "optimizer.bin").touch()
    import_official("dpt", folder, model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    groups = by_group(adapter.state)
    assert groups.keys() == {"discriminator", "unet"}
    given = lora(model.denoiser)
    assert groups["unet"].keys() == given.keys()
    assert all(torch.equal(groups["unet"][key], x) for key, x in given.items())
    assert all(torch.equal(groups["discriminator"][key], x) for key, x in official().items())
    info = adapter.info
    assert (info.method, info.stage, info.step, info.family) == ("dpt", "tune", 4800, "sd15")
    assert info.source == "official release, imported from pytorch_model.bin"
    saved = config.Resolved.from_dict(info.config, info.origin)
    c = saved.method_config
    assert {key: getattr(c, key) for key in SMALL} == SMALL
    assert (c.stage, c.feature, c.num_matching_queries, c.phrase_encoder) == (
        "tune", "up0", 10, "FacebookAI/roberta-base",
    )  # fmt: skip
    assert (c.position, c.pre_norm, c.num_encoder_layers, c.num_decoder_layers) == ("sine", False, 1, 1)
    assert (saved.sample.sampler, saved.sample.spacing, saved.sample.steps) == ("ddim", "leading", 50)
    assert info.origin["dpt.hidden_dim"] == "imported file"
    assert info.origin["dpt.feature"].startswith("official command")
    assert info.origin["dpt.temperature"].startswith("default; how the released file was trained")


def test_without_lora_it_is_a_probe(model, tmp_path):
    content = official(encoder=2, decoder=3, phrases=1024) | {
        "transformer.encoder.norm.weight": torch.ones(16),
        "transformer.encoder.norm.bias": torch.zeros(16),
        "position_embedding.row_embed.weight": torch.rand(50, 8),
        "position_embedding.col_embed.weight": torch.rand(50, 8),
    }
    save_file({key: x.half() for key, x in content.items()}, tmp_path / "probe.safetensors")
    import_official("dpt", tmp_path / "probe.safetensors", model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    c = config.Resolved.from_dict(adapter.info.config).method_config
    assert (adapter.info.stage, c.stage) == ("probe", "probe")
    assert (c.num_encoder_layers, c.num_decoder_layers, c.pre_norm, c.position) == (2, 3, True, "learned")
    assert c.phrase_encoder == "FacebookAI/roberta-large"
    assert {x.dtype for x in adapter.state.values()} == {torch.float32}


def test_features_that_the_width_tells(model, tmp_path):
    """The tiny UNet has blocks of 8 and 16 channels: bottom0 and up1 of 8; bottom1, mid and up0 of 16."""

    def feature(width: int) -> str:
        torch.save(official(channels=width), tmp_path / "x.bin")
        out = tmp_path / f"out{width}"
        import_official("dpt", tmp_path / "x.bin", model.model_id, out)
        return load_adapter(out).info.config["dpt"]["feature"]

    assert feature(16) == "up0" and feature(32) == "bottom1_up0"
    torch.save(official(channels=8), tmp_path / "x.bin")
    assert_refused(
        "feature of 8 channels, which could be bottom0 or up1 .*only up0 or",
        tmp_path / "x.bin",
        model.model_id,
    )
    torch.save(official(channels=7), tmp_path / "x.bin")
    assert_refused("7 channels, which no block .* has; name", tmp_path / "x.bin", model.model_id)


@pytest.mark.slow
def test_misfits(model, tiny_models, make_tiny_sd15, tuned, tmp_path):
    file, name = tmp_path / "pytorch_model.bin", model.model_id
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"
    torch.save(tuned, file)
    wide = str(make_tiny_sd15(tmp_path / "wide", width=64))
    assert_refused("compares with text of width 32, and the model's has 64; name its base", file, wide)
    assert_refused("for Stable Diffusion 1.x and 2.x, and .* sdxl; name", file, tiny_models["sdxl"].model_id)

    def without(*keys: str) -> dict[str, torch.Tensor]:
        return {key: x for key, x in tuned.items() if not key.startswith(keys)}

    for content, message in (
        (without("class_embed", "logit"), r"no checkpoint of DPT: .* it lacks logit_scale, class_embed \("),
        ({"a": torch.ones(1)}, "lacks transformer, query_embed, input_proj and more .it holds a, ..."),
        ({}, "it holds nothing"),
        ([tuned[first]], "holds no tensors by name"),
        (without("class_embed.bias"), "discriminator: missing class_embed.bias; name its base model"),
        (without(first), "LoRA: missing down_blocks.0.*to_q.lora_A.weight; name its base model"),
        (tuned | {first: torch.ones(2, 9)}, r"LoRA: .*lora_A.weight has shape \[2, 9\], expected \[2, 8\]"),
        (tuned | {"unet.conv_in.weight": torch.ones(1)}, "holds unet.conv_in.weight, which is neither of"),
        (tuned | {"text_encoder.x": torch.ones(1)}, "holds text_encoder.x, which is neither of the discrim"),
        (tuned | {"transformer.x": torch.ones(1)}, "discriminator: unused transformer.x; name"),
        (tuned | {"logit_scale": torch.tensor(torch.nan)}, "logit_scale holds values that are no finite"),
        (tuned | {"logit_scale": torch.tensor(1)}, "logit_scale holds values that are no finite"),
        (tuned | {"query_embed.weight": torch.ones(10, 16)}, "has 10 queries; the first 10 are for matching"),
        (tuned | {"query_embed.weight": torch.ones(16)}, r"query_embed.weight is \[16\], expected 2 dimens"),
        (official(phrases=16), "reads phrases of width 16; the official code has FacebookAI/roberta-base"),
        (tuned | {"fusion_proj.0.weight": torch.ones(1)}, "--unet_feature all-C-S, whose S it does not tell"),
    ):
        torch.save(content, file)
        assert_refused(message, file, name)
    file.write_bytes(b"no pickle")
    assert_refused("no PyTorch file that can be read safely", file, name)
    for number in range(2):
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        for i in range(2 * number):
            torch.save(tuned, folder / f"{i}.bin")
        message = "has several files, name one: 0.bin, 1.bin" if number else "has no pytorch_model.bin"
        assert_refused(message, folder, name)


def test_the_command(model, tuned, tmp_path):
    torch.save(tuned, tmp_path / "pytorch_model.bin")
    args = ("adapters", "import", "dpt", tmp_path, "--model", model.model_id, "--out", tmp_path / "out")
    ok(*args)
    told = ok("adapters", "info", tmp_path / "out").stdout
    assert "discriminator.logit_scale" in told and "pytorch_model.bin" in told
    assert "out exists already" in refused(*args)


def test_what_is_read_is_what_was_saved(tuned, tmp_path):
    torch.save(tuned, tmp_path / "x.bin")
    state = read_state(tmp_path / "x.bin")
    assert {official_key(key) for key in state} == tuned.keys()
