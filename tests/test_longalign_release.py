"""The official LongAlign files: what lies together, what is refused, and the published layout of SD1.5."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from longalign_files import lora, save_release, text_adapter
from typer.testing import CliRunner

from align_cli import config
from align_cli.adapters import attach, import_official, load_adapter, write_adapter
from align_cli.cli.main import app
from align_cli.errors import UserError
from align_cli.methods.longalign.layers import longalign_layers
from align_cli.methods.longalign.lora_file import from_list, to_list
from align_cli.methods.longalign.release import find, stage_of
from align_cli.models.lora import LoraTuning
from align_cli.models.parts import outline
from align_cli.models.states import by_group

PUBLISHED = ["s28750_lora_vis.pt", "sd15-reward-3750.pt"]


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


def assert_half(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == torch.float32 and torch.equal(state[key], value.half().float())


def assert_refused(message: str, path: Path, model: str) -> None:
    """One line, and nothing is written."""
    with pytest.raises(UserError, match=message) as caught:
        import_official("longalign", path, model, path.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()


# ---------------------------------------------------------------- the published layout


def test_the_layers_of_sd15_are_in_the_official_order():
    unet = outline("sd15", "unet")
    names = longalign_layers(unet)
    assert len(names) == 224
    assert hashlib.sha1("\n".join(names).encode()).hexdigest() == "63655dbaae4dc9df1639a96b6761ca2d5af90986"
    assert names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[-1] == "mid_block.resnets.1.conv2"
    tuning = LoraTuning(unet, rank=32, alpha=32, targets=longalign_layers)
    assert sum(p.numel() for p in tuning.parameters()) == 28_291_072


def test_the_widths_of_the_text_adapter_of_sd15():
    with torch.device("meta"):
        adapter = text_adapter((1024, 896, 768))
    shapes = {key: list(x.shape) for key, x in adapter.state_dict().items()}
    assert shapes["ff1.net.0.proj.weight"] == [8192, 1024] and shapes["ff2.net.2.weight"] == [768, 3584]
    assert sum(x.numel() for x in adapter.parameters()) == 21_254_528


# ---------------------------------------------------------------- what is read


def test_the_three_published_files(model, tmp_path):
    save_release(tmp_path / "LongSD", model.model_id, PUBLISHED, "s28750_adapter")
    import_official("longalign", tmp_path / "LongSD", model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    groups = by_group(adapter.state)
    assert groups.keys() == {"adapter", "align", "unet"}
    assert_half(groups["align"], lora(model.denoiser, 0))
    assert_half(groups["unet"], lora(model.denoiser, 1))
    given = text_adapter().state_dict()
    assert all(torch.equal(groups["adapter"][key], given[key]) for key in given)
    info = adapter.info
    assert (info.method, info.stage, info.step, info.family) == ("longalign", "reward", 3750, "sd15")
    assert info.source == (
        "official release, imported from s28750_lora_vis.pt, sd15-reward-3750.pt and s28750_adapter/"
    )
    saved = config.Resolved.from_dict(info.config, info.origin)
    c = saved.method_config
    assert (c.stage, c.lora_rank, c.adapter_width, c.token_length) == ("reward", 3, 10, 240)
    assert (c.steps, c.guidance, c.grad_stride, c.caption_dropout) == (50, 7.5, 10, 0.0)
    assert (saved.sample.sampler, saved.sample.steps, saved.sample.guidance) == ("unipc", 25, 7.5)
    assert info.origin["longalign.lora_rank"] == "imported file"
    assert info.origin["longalign.token_length"].startswith("official command")
    assert info.origin["longalign.omega"].startswith("default; how the released file was trained")


def test_one_file_takes_what_it_stands_on_from_beside(model, tmp_path):
    folder = tmp_path / "LongSD"
    save_release(folder, model.model_id, PUBLISHED, "s28750_adapter")
    import_official("longalign", folder / PUBLISHED[0], model.model_id, tmp_path / "align")
    align = load_adapter(tmp_path / "align")
    assert align.info.stage == "align" and align.info.step == 28750
    groups = by_group(align.state)
    assert groups.keys() == {"adapter", "unet"}
    assert_half(groups["unet"], lora(model.denoiser, 0))
    import_official("longalign", folder / PUBLISHED[1], model.model_id, tmp_path / "reward")
    assert load_adapter(tmp_path / "reward").info.stage == "reward"


def test_all_four_stages(model, tmp_path):
    names = ["lora_vis.pt", "sd15-lcm-2000.pt", "sd15-rewardlcm-100.pt"]
    save_release(tmp_path / "run", model.model_id, names, "adapter")
    import_official("longalign", tmp_path / "run", model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    groups = by_group(adapter.state)
    assert groups.keys() == {"adapter", "align", "lcm", "unet"}
    for i, group in enumerate(("align", "lcm", "unet")):
        assert_half(groups[group], lora(model.denoiser, i))
    saved = config.Resolved.from_dict(adapter.info.config)
    assert (adapter.info.stage, saved.method_config.steps) == ("reward-lcm", 4)
    assert (saved.sample.sampler, saved.sample.steps, saved.sample.guidance) == ("lcm", 4, 1.0)
    import_official("longalign", tmp_path / "run" / names[1], model.model_id, tmp_path / "lcm")
    assert load_adapter(tmp_path / "lcm").info.stage == "lcm"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("s28750_lora_vis.pt", "align"), ("lora_vis.pt", "align"), ("sd15-align.pt", "align"),
        ("sd15-reward-3750.pt", "reward"), ("reward.pt", "reward"), ("sd15-LCM.pt", "lcm"),
        ("reward-lcm.pt", "reward-lcm"), ("sd15_rewardlcm_5.pt", "reward-lcm"), ("weights.pt", None),
    ],
)  # fmt: skip
def test_names_tell_stages(name, stage):
    assert stage_of(Path(name)) == stage


def test_of_several_the_plain_names_and_the_same_step(model, tmp_path):
    save_release(tmp_path, model.model_id, ["s10_lora_vis.pt", "s20_lora_vis.pt", "reward.pt"], "s10_adapter")
    text_adapter().to_folder(tmp_path / "s20_adapter")
    with pytest.raises(UserError, match=r"several files of stage align \(s10_lora_vis.pt, s20_lora_vis.pt\)"):
        find(tmp_path)
    assert find(tmp_path / "s20_lora_vis.pt").adapter.name == "s20_adapter"
    (tmp_path / "s20_lora_vis.pt").rename(tmp_path / "lora_vis.pt")
    with pytest.raises(UserError, match=r"lora_vis.pt was trained with a text adapter.*several \(s10_ad"):
        find(tmp_path)
    (tmp_path / "s20_adapter").rename(tmp_path / "adapter")
    found = find(tmp_path)
    assert found.loras["align"].name == "lora_vis.pt" and found.adapter.name == "adapter"


def test_an_imported_release_at_work(model, tiny_models, tmp_path):
    """On segments and T5 (here the one of another tiny model), with both LoRAs merged."""
    save_release(tmp_path / "LongSD", model.model_id, PUBLISHED, "s28750_adapter")
    import_official("longalign", tmp_path / "LongSD", model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    section = adapter.info.config["longalign"] | {"t5": tiny_models["sd3"].model_id, "token_length": 24}
    info = replace(adapter.info, config={"method": "longalign", "longalign": section})
    write_adapter(tmp_path / "tiny", info, adapter.state)
    z, t = torch.ones(1, 4, 8, 8), torch.tensor(300)
    plain = model.predict(z, t, model.encode_text(["a red circle. a blue square."]))
    with torch.no_grad(), attach(model, [str(tmp_path / "tiny")]):
        cond = model.encode_text(["a red circle. a blue square."])
        found = model.predict(z, t, cond)
    assert cond.tokens.shape == (1, 48, 32)
    groups = by_group(adapter.state)
    with torch.no_grad(), ExitStack() as stack:
        assert (model.predict(z, t, cond) - found).abs().max() > 0.05
        for group in ("align", "unet"):
            tuning = LoraTuning(model.denoiser, rank=3, alpha=3, targets=longalign_layers)
            tuning.load_state(groups[group])
            stack.enter_context(tuning.merged())
        torch.testing.assert_close(model.predict(z, t, cond), found, atol=1e-4, rtol=0)
    assert torch.equal(model.predict(z, t, model.encode_text(["a red circle. a blue square."])), plain)


# ---------------------------------------------------------------- refusals


def test_what_is_missing(model, tmp_path):
    folder, name = tmp_path / "LongSD", model.model_id
    save_release(folder, name, PUBLISHED)
    assert_refused("was trained with a text adapter, a folder such as adapter/.* holds none", folder, name)
    text_adapter().to_folder(folder / "adapter")
    assert_refused(r"holds a text adapter alone: start a training.*text_adapter=", folder / "adapter", name)
    (folder / PUBLISHED[0]).unlink()
    assert_refused("sd15-reward-3750.pt stands on the LoRA of stage align, which .* put it", folder, name)
    (folder / PUBLISHED[1]).rename(folder / "weights.pt")
    assert_refused(r"holds no \*.pt of LongAlign; expected for example lora_vis.pt and", folder, name)
    assert_refused("weights.pt does not tell its stage; rename it: lora_vis.pt,", folder / "weights.pt", name)
    assert_refused("does not exist", tmp_path / "none", name)
    save_release(folder, name, ["lora_vis.pt", "reward.pt", "lcm.pt"])
    assert_refused(r"stages that exclude each other \(reward, lcm\): name one's file", folder, name)


def test_files_that_do_not_fit(model, tiny_models, make_tiny_sd15, tmp_path):
    folder, name = tmp_path / "LongSD", model.model_id
    save_release(folder, name, ["lora_vis.pt"], "adapter")
    file = folder / "lora_vis.pt"
    wide = str(make_tiny_sd15(tmp_path / "wide", width=64))
    assert_refused(
        r"does not fit: layer 6 of 65, down_blocks.0.*attn2.to_k, has down of shape \[3, 32\], expected "
        r"\[3, 64\]; name", folder, wide,
    )  # fmt: skip
    assert_refused(
        "for Stable Diffusion 1.x, and .* is of the family sdxl", folder, tiny_models["sdxl"].model_id
    )
    content = torch.load(file, weights_only=True)
    tensors = len(content)
    for wrong, message in (
        (
            content[:-2],
            f"holds {tensors - 2} tensors; the LoRA of this UNet has {tensors}, two for each of 65",
        ),
        (content[:1], f"holds 1 tensors; the LoRA of this UNet has {tensors}"),
        ([], "holds 0 tensors"),
        ({"a": content[0]}, "holds no list of tensors .* but a dict"),
        ([*content[:-1], "x"], "holds no list of tensors"),
        ([content[1], content[0], *content[2:]], "layer 1 of 65, down_blocks.0.attentions.0.transformer_blo"),
        ([content[0], content[1][:2], *content[2:]], "layer 1 of 65"),
        ([*content[:-1], content[-1] / 0], "mid_block.resnets.1.conv2 holds values that are no finite"),
        ([*content[:-1], content[-1].int()], "mid_block.resnets.1.conv2 holds values that are no finite"),
    ):
        torch.save(wrong, file)
        assert_refused(message, folder, name)
    file.write_bytes(b"no pickle")
    assert_refused("no PyTorch file that can be read safely", folder, name)
    torch.save(content, file)
    (folder / "adapter").rename(tmp_path / "old")
    text_adapter((48, 10, 16)).to_folder(folder / "adapter")
    assert_refused("makes text of width 16, and the UNet of .* reads 32; name", folder, name)


def test_a_list_is_the_inverse_of_its_reading(model):
    state = lora(model.denoiser)
    back = from_list(to_list(state, model.denoiser, torch.float32), model.denoiser, "file")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_the_command(model, tmp_path):
    save_release(tmp_path / "LongSD", model.model_id, PUBLISHED, "s28750_adapter")

    def call(*args: object):
        return CliRunner().invoke(app, ["adapters", *map(str, args)])

    args = ("import", "longalign", tmp_path / "LongSD", "--model", model.model_id, "--out", tmp_path / "out")
    result = call(*args)
    assert result.exit_code == 0, result.output
    told = call("info", tmp_path / "out").stdout
    assert "align.mid_block.resnets.1.conv2.lora_A.weight" in told and "sd15-reward-3750.pt" in told
    again = call(*args)
    assert again.exit_code == 2 and "out exists already" in again.stderr
