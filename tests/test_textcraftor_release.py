"""The official TextCraftor checkpoints: every layout of keys is read, nothing is ever loaded in part."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from textcraftor_files import changed, official
from typer.testing import CliRunner

from align_cli import config
from align_cli.adapters import attach, import_official, load_adapter
from align_cli.cli.main import app
from align_cli.errors import UserError
from align_cli.models.parts import family_of, outline

LAYOUTS = ["module.text_model.", "text_model.", "module.", ""]


@pytest.fixture
def model(tiny_models):
    return tiny_models["sd15"]


@pytest.fixture
def text(model) -> dict[str, torch.Tensor]:
    return changed(model.encoders[0])


@pytest.fixture
def unet(model) -> dict[str, torch.Tensor]:
    return changed(model.denoiser)


def bring_in(source: Path, model, out: Path):
    import_official("textcraftor", source, model.model_id, out)
    return load_adapter(out)


def assert_same(state: dict[str, torch.Tensor], part: str, expected: dict[str, torch.Tensor]) -> None:
    mine = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[k], v) and mine[k].dtype == torch.float32 for k, v in expected.items())


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("prefix", LAYOUTS)
@pytest.mark.parametrize("old", [True, False])
def test_every_layout_of_keys(model, text, tmp_path, prefix, old):
    content = official("text_encoder", text, prefix)
    if old:  # as transformers 4 wrote it until 4.30
        content[f"{prefix}embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(content, tmp_path / "tc_text.pth")
    adapter = bring_in(tmp_path / "tc_text.pth", model, tmp_path / "out")
    assert_same(adapter.state, "text_encoder", text)
    assert len(adapter.state) == len(text)
    assert adapter.info.stage == "text" and adapter.info.family == "sd15"


def test_the_keys_tell_what_a_file_is(model, text, unet, tmp_path):
    torch.save(official("unet", unet), tmp_path / "tc_text.pth")
    adapter = bring_in(tmp_path / "tc_text.pth", model, tmp_path / "unet")
    assert_same(adapter.state, "unet", unet)
    assert adapter.info.stage == "unet" and len(adapter.state) == len(unet)
    save_file(official("text_encoder", text), tmp_path / "anything.safetensors")
    adapter = bring_in(tmp_path / "anything.safetensors", model, tmp_path / "text")
    assert_same(adapter.state, "text_encoder", text)


def test_old_and_half_files(model, text, tmp_path):
    half = {key: value.half() for key, value in text.items()}
    torch.save(official("text_encoder", half), tmp_path / "half.pth")
    adapter = bring_in(tmp_path / "half.pth", model, tmp_path / "half")
    assert_same(adapter.state, "text_encoder", {key: value.float() for key, value in half.items()})
    torch.save(official("text_encoder", text), tmp_path / "torch1.pth", _use_new_zipfile_serialization=False)
    assert_same(bring_in(tmp_path / "torch1.pth", model, tmp_path / "old").state, "text_encoder", text)


def test_a_folder_with_both(model, text, unet, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(official("text_encoder", text), folder / "tc_text.pth")
    torch.save(official("unet", unet), folder / "tc_unet.pth")
    torch.save(official("text_encoder", changed(model.encoders[0], 5)), folder / "tc_text_e_0_iter_0.pth")
    torch.save({"layers.0.weight": torch.zeros(2)}, folder / "head.pth")
    (folder / "astronaut_horse_0_iter_0.png").write_bytes(b"picture")
    adapter = bring_in(folder, model, tmp_path / "out")
    assert_same(adapter.state, "text_encoder", text)
    assert_same(adapter.state, "unet", unet)
    assert adapter.info.source == "official release, imported from tc_text.pth and tc_unet.pth"
    saved = config.Resolved.from_dict(adapter.info.config, adapter.info.origin)
    c, origin = saved.method_config, saved.origin
    assert (c.stage, c.steps, c.grad_steps, c.test_grad_steps) == ("joint", 25, 5, 15)
    assert (c.guidance, c.spacing, c.literal_split) == (7.5, "lead", False)
    assert c.rewards == {"clip-g14": 50.0, "aesthetic": 3.0, "pickscore": 1.0, "hpsv2": 100.0}
    assert (saved.sample.sampler, saved.sample.spacing) == ("ddim", "lead")
    assert (saved.sample.steps, saved.sample.guidance) == (25, 7.5)
    assert origin["textcraftor.stage"] == "imported file"
    recorded = "official command; not recorded in the released file"
    assert origin["textcraftor.rewards"] == origin["sample.spacing"] == recorded
    assert origin["textcraftor.reward_dtype"].startswith("default; how the released file was trained")
    (folder / "tc_text.pth").unlink()
    shutil.copy(folder / "tc_text_e_0_iter_0.pth", folder / "tc_text_e_0_iter_5000.pth")
    with pytest.raises(
        UserError, match=r"several files of a text_encoder, name one: tc_text_e_0_iter_0.pth, tc_text_e_0"
    ):
        import_official("textcraftor", folder, model.model_id, tmp_path / "several")


# ---------------------------------------------------------------- at work


def test_an_imported_adapter_is_the_official_module(model, text, unet, tmp_path):
    torch.save(official("text_encoder", text), tmp_path / "tc_text.pth")
    torch.save(official("unet", unet), tmp_path / "tc_unet.pth")
    bring_in(tmp_path, model, tmp_path / "out")
    encoder, denoiser = copy.deepcopy(model.encoders[0]), copy.deepcopy(model.denoiser)
    encoder.load_state_dict(text)
    denoiser.load_state_dict(unet)
    prompts, z, t = ["a red circle", ""], torch.ones(2, 4, 8, 8), torch.tensor(300)
    plain = model.encode_text(prompts).tokens
    with torch.no_grad(), model.using(denoiser=denoiser, encoders={0: encoder}):
        tokens = model.encode_text(prompts)
        prediction = model.predict(z, t, tokens)
    assert not torch.allclose(tokens.tokens, plain, atol=1e-2)
    with torch.no_grad(), attach(model, [str(tmp_path / "out")]):
        (change,) = model.text_changes
        assert [change.first_step(n) for n in (25, 50, 10)] == [10, 35, 0]
        assert torch.equal(change.encode(prompts).tokens, tokens.tokens)
        assert torch.equal(model.predict(z, t, tokens), prediction)


def test_the_first_encoder_of_sdxl(tiny_models, tmp_path):
    model = tiny_models["sdxl"]
    text = changed(model.encoders[0])
    torch.save(official("text_encoder", text), tmp_path / "tc_text.pth")
    adapter = bring_in(tmp_path, model, tmp_path / "out")
    assert_same(adapter.state, "text_encoder", text)
    assert adapter.info.family == "sdxl" and "sample" not in adapter.info.config
    plain = model.encode_text(["a red circle"]).tokens
    with attach(model, [str(tmp_path / "out")]):
        mixed = model.text_changes[0].encode(["a red circle"]).tokens
    assert torch.equal(mixed[..., 16:], plain[..., 16:])  # the second encoder's, untouched
    assert not torch.allclose(mixed[..., :16], plain[..., :16], atol=1e-2)


def test_the_command(model, text, tmp_path):
    torch.save(official("text_encoder", text), tmp_path / "tc_text_e_0_iter_10000.pth")

    def call(*args: object):
        return CliRunner().invoke(app, [str(a) for a in args])

    args = ("adapters", "import", "textcraftor", tmp_path, "--model", model.model_id)
    result = call(*args, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = call("adapters", "info", tmp_path / "out").stdout
    assert "imported from tc_text_e_0_iter_10000.pth" in told
    drawn = call("sample", "--prompt", "a red circle", "--adapter", tmp_path / "out", "--out", tmp_path / "p")
    assert drawn.exit_code == 0, drawn.output
    assert "ddim, 25 steps (lead), guidance 7.5, as recorded in" in drawn.stderr


# ---------------------------------------------------------------- sizes without weights


def test_published_models_are_known_without_their_files():
    """Parameters as published: 123 and 860 million."""
    for model in ("sd15", "sd14", "CompVis/stable-diffusion-v1-4"):
        text, unet = outline(model, "text_encoder"), outline(model, "unet")
        assert sum(p.numel() for p in text.parameters()) == 123_060_480
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964
        assert text.config.hidden_act == "quick_gelu" and all(p.is_meta for p in unet.parameters())
        assert family_of(model) == "sd15"
    assert sum(p.numel() for p in outline("sdxl", "text_encoder").parameters()) == 123_060_480
    assert family_of("sdxl") == "sdxl"


def test_outlines_of_folders(tiny_models):
    for family, model in tiny_models.items():
        assert family_of(model.model_id) == family
        name = "transformer" if family == "sd3" else "unet"
        for part, module in ((name, model.denoiser), ("text_encoder", model.encoders[0])):
            found = outline(model.model_id, part)
            shapes = {key: p.shape for key, p in module.named_parameters()}
            assert {key: p.shape for key, p in found.named_parameters()} == shapes
    with pytest.raises(UserError, match="has no text_encoder_2"):
        outline(tiny_models["sd15"].model_id, "text_encoder_2")


# ---------------------------------------------------------------- refusals


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil"),)


def test_refusals(model, text, unet, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = official("text_encoder", text)
    first = "module.text_model.embeddings.token_embedding.weight"

    def refused(content: object, message: str, base: str = model.model_id) -> None:
        torch.save(content, "x.pth")
        with pytest.raises(UserError, match=message) as caught:
            import_official("textcraftor", "x.pth", base, Path("out"))
        assert "\n" not in str(caught.value)
        assert not Path("out").exists()

    refused({k: v for k, v in good.items() if k != first}, "missing embeddings.token_embedding.weight; name")
    halved = dict(list(good.items())[: len(good) // 2])
    refused(halved, r"missing .*, .*, .* and \d+ more")
    refused({**good, "module.text_model.x.weight": torch.zeros(2)}, r"unused x\.weight")
    refused({**good, "text_projection.weight": torch.zeros(2)}, "unused text_projection.weight")
    refused({**good, first: torch.zeros(3, 32)}, r"has shape \[3, 32\], expected \[\d+, 32\]")
    refused({**good, first: torch.full_like(good[first], torch.nan)}, "no finite numbers")
    refused({**good, first: torch.zeros_like(good[first]).int()}, "no finite numbers")
    refused({**good, first.removeprefix("module."): good[first]}, "token_embedding.weight twice")
    refused({**official("unet", unet), "module.extra": torch.zeros(1)}, "unused extra")
    refused({"layers.0.weight": torch.zeros(2)}, "no text encoder and no UNet .*: it holds layers.0.weight")
    refused({}, "it holds nothing")
    refused(torch.zeros(3), "holds a Tensor, expected tensors by name")
    refused({"state_dict": good}, "holds a dict called 'state_dict', expected tensors by name")
    refused(Evil(), "no PyTorch file that can be read safely")
    assert not Path("evil").exists()
    refused(good, r"does not fit the text_encoder of sd15: .*; name its base model with --model", "sd15")
    refused(good, "unknown model 'sd51'", "sd51")
    refused(good, "which .* does not have", tiny_models["sd3"].model_id)
    torch.save(good, "whole.pth")
    whole = Path("whole.pth").read_bytes()
    for name, content in (
        ("cut.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("list.pth", b"a red circle\n" * 9),
    ):  # fmt: skip
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is no PyTorch file that can be read safely"):
            import_official("textcraftor", name, model.model_id, Path("out"))
    Path("cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="cut.safetensors cannot be read"):
        import_official("textcraftor", "cut.safetensors", model.model_id, Path("out"))


def test_folders_with_nothing(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no text encoder and no UNet .* \(no file \*\.pth, "):
        import_official("textcraftor", tmp_path / "empty", model.model_id, tmp_path / "out")
    torch.save({"w": torch.zeros(1)}, tmp_path / "empty" / "head.pth")
    with pytest.raises(UserError, match=r"\(only head\.pth\)"):
        import_official("textcraftor", tmp_path / "empty", model.model_id, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        import_official("textcraftor", tmp_path / "none", model.model_id, tmp_path / "out")
    assert not (tmp_path / "out").exists()
