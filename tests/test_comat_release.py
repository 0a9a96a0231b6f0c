"""The official CoMat checkpoint: its keys, what its shapes tell, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from comat_files import FILE, official, save_official
from dpt_files import lora, official_lora
from model_helpers import sdxl_unet
from safetensors.torch import save_file

from align_cli import config
from align_cli.adapters import attach, import_official, load_adapter
from align_cli.errors import UserError
from align_cli.exporting.compare import outputs
from align_cli.methods.comat.release import official_key, read_release, read_state
from align_cli.models.lora import UNET_ATTENTION, LoraTuning, lora_layers
from align_cli.models.parts import outline
from align_cli.models.states import attention_lora_key

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
LEFT_OUT = "ignore:.*D_sd, the discriminator, is left out:UserWarning"


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


def assert_refused(message: str, path: Path, model: str) -> None:
    """One line, and nothing is written."""
    with pytest.raises(UserError, match=message) as caught:
        import_official("comat", path, model, path.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()


@pytest.mark.slow
def test_the_lora_of_the_published_models_by_its_size():
    """The parameters that were counted in the official code, rank 128."""
    for unet, layers, count in (
        (outline("sd15", "unet"), 128, 25_509_888),
        (sdxl_unet(), 560, 185_794_560),
    ):
        assert len(lora_layers(unet, UNET_ATTENTION)) == layers
        with torch.device("meta"):
            tuning = LoraTuning(unet, rank=128, alpha=128, targets=UNET_ATTENTION)
        assert sum(p.numel() for p in tuning.parameters()) == count


def test_keys_both_ways():
    for kind in ("to_q", "to_k", "to_v", "to_out.0"):
        for end, side in (("A", "down"), ("B", "up")):
            own = f"{LAYER}.{kind}.lora_{end}.weight"
            assert official_key(own) == f"unet.unet.{LAYER}.{kind}.lora.{side}.weight"
            processor = f"{LAYER}.processor.{kind.removesuffix('.0')}_lora.{side}.weight"
            for prefix in ("unet.unet.", "unet.", ""):
                for spelling in (f"{LAYER}.{kind}.lora.{side}.weight", own, processor):
                    assert attention_lora_key(prefix + spelling) == own
    for stray in (
        "unet.conv_in.weight", f"unet.{LAYER}.to_q.weight", f"unet.{LAYER}.to_q.alpha",
        f"unet.{LAYER}.to_out.lora.down.weight", "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ):  # fmt: skip
        assert attention_lora_key(stray) is None


def test_a_checkpoint(model, tmp_path):
    save_official(tmp_path / "checkpoint-2000", model.denoiser)
    with pytest.warns(UserWarning, match="checkpoint-2000/D_sd, the discriminator, is left out"):
        import_official("comat", tmp_path / "checkpoint-2000", model.model_id, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    given = lora(model.denoiser)
    assert adapter.state.keys() == {f"unet.{key}" for key in given}
    assert all(torch.equal(adapter.state[f"unet.{key}"], x) for key, x in given.items())
    info = adapter.info
    assert (info.method, info.stage, info.step, info.family) == ("comat", "", 2000, "sd15")
    assert info.source == f"official release, imported from {FILE}"
    saved = config.Resolved.from_dict(info.config, info.origin)
    c = saved.method_config
    assert (c.lora_rank, c.steps, c.grad_steps, c.attention_steps) == (2, 50, 5, 2)
    assert (c.detach_input, c.official_range, c.entities) == (False, False, "official")
    assert (c.image_size, saved.sample.image_size) == (0, 0)  # of a model of 32 pixels
    assert (saved.sample.sampler, saved.sample.spacing, saved.sample.steps) == ("ddpm", "leading", 50)
    assert info.origin["comat.lora_rank"] == "imported file"
    assert info.origin["comat.grad_steps"].startswith("official command")
    assert info.origin["comat.parser"].startswith("default; how the released file was trained")


def test_at_work_it_moves_the_weights_by_b_times_a(model, tmp_path):
    """No alpha: the change of a layer is B A; and two adapters add up."""
    for seed in (0, 1):
        save_file(official(model.denoiser, seed=seed), tmp_path / f"{seed}.safetensors")
        import_official("comat", tmp_path / f"{seed}.safetensors", model.model_id, tmp_path / f"a{seed}")
    states = [lora(model.denoiser, seed=seed) for seed in (0, 1)]
    name = f"{LAYER}.to_out.0"
    weight = model.denoiser.get_submodule(name).weight
    before, plain = weight.detach().clone(), outputs(model, denoiser=True).prediction
    changes = [state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for state in states]
    with attach(model, [str(tmp_path / "a0")]):
        torch.testing.assert_close(weight.detach(), before + changes[0])
        one = outputs(model, denoiser=True).prediction
    with attach(model, [str(tmp_path / "a0"), f"{tmp_path / 'a1'}@0.5"]):
        torch.testing.assert_close(weight.detach(), before + changes[0] + 0.5 * changes[1])
        two = outputs(model, denoiser=True).prediction
    with attach(model, [f"{tmp_path / 'a0'}@0"]):
        assert torch.equal(outputs(model, denoiser=True).prediction, plain)
    assert torch.equal(weight.detach(), before)
    assert (one - plain).abs().max() > 0.05 and (two - one).abs().max() > 0.05


@pytest.mark.filterwarnings(LEFT_OUT)
def test_the_rules_of_sdxl(tiny_models, tmp_path):
    model = tiny_models["sdxl"]
    save_official(tmp_path / "x", model.denoiser, rank=3)
    import_official("comat", tmp_path / "x", model.model_id, tmp_path / "out")
    info = load_adapter(tmp_path / "out").info
    c = config.Resolved.from_dict(info.config).method_config
    assert (info.family, info.step, c.lora_rank) == ("sdxl", 0, 3)
    assert (c.detach_input, c.official_range, c.fidelity_weight) == (True, True, 0.5)
    assert (c.discriminator, c.lr_discriminator) == ("sd15", 5e-5)


@pytest.mark.slow
def test_the_official_size(tmp_path, monkeypatch):
    """512 pixels where the model itself draws at least that."""
    unet = outline("sd15", "unet")
    zeros = {
        key: torch.zeros(shape)
        for name, layer in lora_layers(unet, UNET_ATTENTION).items()
        for key, shape in (
            (f"unet.unet.{name}.lora.down.weight", (1, layer.weight.shape[1])),
            (f"unet.unet.{name}.lora.up.weight", (layer.weight.shape[0], 1)),
        )
    }
    save_file(zeros, tmp_path / FILE)
    info, state = read_release(tmp_path / FILE, "sd15")
    assert len(state) == 256
    assert info.config["comat"]["image_size"] == info.config["sample"]["image_size"] == 512
    monkeypatch.setattr("align_cli.methods.comat.release.outline", lambda *_: sdxl_unet())
    monkeypatch.setattr("align_cli.methods.comat.release.family_of", lambda _: "sdxl")
    with pytest.raises(UserError, match="text of width 768, and that of sdxl has 2048; .*, for example sd15"):
        read_release(tmp_path / FILE, "sdxl")


def test_other_spellings(model, tmp_path):
    given = lora(model.denoiser)
    spellings = {
        "single.safetensors": official(model.denoiser, prefix="unet."),
        "none.safetensors": official(model.denoiser, prefix=""),
        "peft.safetensors": {f"unet.{key}": x for key, x in given.items()},
        "processor.bin": official_lora(model.denoiser),
        "half.safetensors": {key: x.half() for key, x in official(model.denoiser).items()},
    }
    for name, content in spellings.items():
        file = tmp_path / name
        torch.save(content, file) if file.suffix == ".bin" else save_file(content, file)
        state = read_state(file)
        assert state.keys() == given.keys() and {x.dtype for x in state.values()} == {torch.float32}
        expected = {key: x.half().float() for key, x in given.items()} if name[0] == "h" else given
        assert all(torch.equal(state[key], x) for key, x in expected.items())
    facts = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'}
    save_file(spellings["peft.safetensors"], tmp_path / "facts.safetensors", facts)
    assert read_state(tmp_path / "facts.safetensors").keys() == given.keys()


@pytest.mark.slow
def test_misfits(model, tiny_models, make_tiny_sd15, tmp_path):
    file, name, tuned = tmp_path / "x.safetensors", model.model_id, official(model.denoiser)
    save_file(tuned, file)
    wide = str(make_tiny_sd15(tmp_path / "wide", width=64))
    assert_refused("for text of width 32, and that of .*wide has 64; name its base model with", file, wide)
    assert_refused("Stable Diffusion 1.5 and XL, and .* sd3; name", file, tiny_models["sd3"].model_id)
    assert_refused(r"width 32, and that of .* has 40; name its base", file, tiny_models["sdxl"].model_id)
    first = next(key for key in tuned if key.endswith("attn1.to_q.lora.down.weight"))
    own = f"unet.{attention_lora_key(first)}"
    i = tuned[first].shape[1]
    nan = torch.full_like(tuned[first], torch.nan)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora.down.weight"
    for content, message in (
        ({}, "is no checkpoint of CoMat: it holds nothing"),
        ({"a": torch.ones(1)}, "holds a, which is no LoRA of the UNet's attention as CoMat trains it"),
        (tuned | {text: torch.ones(2, 2)}, f"holds {text}, which is no LoRA of the UNet's attention"),
        ({key: x for key, x in tuned.items() if key != first}, "missing .*to_q.lora_A.weight; name its base"),
        (tuned | {first: torch.ones(2, i + 1)}, rf"has shape \[2, {i + 1}\], expected \[2, {i}\]; name"),
        (tuned | {first: torch.ones(2)}, rf"has shape \[2\], expected \[2, {i}\]"),
        (tuned | {own: torch.ones(2, i)}, "holds .*to_q.lora_A.weight twice, in two spellings"),
        (tuned | {first: nan}, "holds values that are no finite numbers"),
        (tuned | {first: torch.ones(2, i).int()}, "holds values that are no finite numbers"),
        (tuned | {f"unet.{LAYER}9.to_q.lora.up.weight": torch.ones(2, 2)}, "unused .*attn29.to_q.lora_B"),
    ):
        save_file(content, file)
        assert_refused(message, file, name)
    for facts, message in (
        ('{"unet.r": 2, "unet.lora_alpha": 4}', "says alpha 4 of rank 2; a LoRA of CoMat has alpha = rank"),
        ("{", "cannot be read: lora_adapter_metadata: "),
    ):
        save_file(tuned, file, {"lora_adapter_metadata": facts})
        assert_refused(message, file, name)
    file.write_bytes(b"no tensors")
    assert_refused("x.safetensors cannot be read", file, name)
    torch.save([tuned[first]], tmp_path / "x.bin")
    assert_refused("holds no tensors by name", tmp_path / "x.bin", name)


def test_folders_that_do_not_tell(model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert_refused("run has no pytorch_lora_weights.safetensors", folder, model.model_id)
    for step in (200, 400, 1800, 2000):
        save_official(folder / f"checkpoint-{step}", model.denoiser)
    assert_refused(
        "has checkpoints, name one: checkpoint-2000, checkpoint-1800, checkpoint-400, ...",
        folder,
        model.model_id,
    )
    for name in "ab":
        save_file(official(model.denoiser), folder / f"{name}.safetensors")
    assert_refused("several files, name one: a.safetensors, b.safetensors", folder, model.model_id)


def test_the_command(model, tmp_path):
    folder = tmp_path / "checkpoint-200"
    save_official(folder, model.denoiser)
    args = ("adapters", "import", "comat", folder, "--model", model.model_id, "--out", tmp_path / "out")
    with pytest.warns(UserWarning, match="D_sd, the discriminator, is left out: only its training needs it"):
        ok(*args)
    told = ok("adapters", "info", tmp_path / "out").stdout
    assert f"unet.{LAYER}.to_q.lora_A.weight" in told and FILE in told
    assert "out exists already" in refused(*args)
