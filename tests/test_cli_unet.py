"""--unet in the real commands: a separately tuned denoiser, remembered by adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from softrepa_helpers import save_random_adapter

from align_cli.adapters import load_adapter, restore
from align_cli.models.loading import load_model
from align_cli.pictures import read_metadata
from align_cli.settings import ModelSettings

QUICK = ("--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def tuned(make_tiny_sd15, tmp_path_factory) -> Path:
    """A folder as training scripts leave it: unet/ alone. Do not write into it."""
    folder = tmp_path_factory.mktemp("tuned") / "checkpoint-100"
    whole = make_tiny_sd15(folder.parent / "pipeline", seed=5)
    shutil.copytree(whole / "unet", folder / "unet")
    return folder


def test_the_folder_itself_or_its_unet(tuned, tiny_sd15_folder, monkeypatch):
    def load(unet: object):
        return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu", unet=str(unet)))

    own, there, inside = load(""), load(tuned), load(tuned / "unet")
    assert torch.equal(there.denoiser.conv_in.weight, inside.denoiser.conv_in.weight)
    assert not torch.equal(there.denoiser.conv_in.weight, own.denoiser.conv_in.weight)
    assert (own.denoiser_id, there.denoiser_id) == ("", str(tuned.resolve()))
    monkeypatch.chdir(tuned.parent)
    assert load(tuned.name).denoiser_id == str(tuned.resolve()), "it is found from elsewhere, too"


def test_sample_edit_and_eval(tuned, tiny_sd15_folder, tmp_path):
    model = ("--model", tiny_sd15_folder, *QUICK)
    drawing = ("sample", *model, "--prompt", "a red circle")
    ok(*drawing, "--out", tmp_path / "a")
    said = ok(*drawing, "--unet", tuned, "--out", tmp_path / "b").stderr
    assert f"{tiny_sd15_folder}, unet {tuned}: ddim" in said
    own, other = (next((tmp_path / name).glob("001*.png")) for name in "ab")
    assert own.read_bytes() != other.read_bytes()
    assert read_metadata(other)["unet"] == str(tuned) and "unet" not in read_metadata(own)
    prompts = ("--src-prompt", "a red circle", "--tgt-prompt", "a blue circle", "--n-start", 1)
    ok("edit", *model, *prompts, "--unet", tuned, "--out", tmp_path / "e")
    assert read_metadata(next((tmp_path / "e").glob("*-edited.png")))["unet"] == str(tuned)
    (tmp_path / "list.txt").write_text("a red circle\n")
    measuring = ("eval", tmp_path / "list.txt", *model, "--scorers", "none", "--out", tmp_path / "m")
    ok(*measuring, "--unet", tuned)
    assert json.loads((tmp_path / "m" / "results.json").read_text())["model"]["unet"] == str(tuned)
    assert "holds another evaluation" in refused(*measuring, "--resume")
    given = ("eval", tmp_path / "list.txt", "--images", f"a={tmp_path / 'a'}", "--unet", tuned)
    assert "--unet is for drawing, --images gives pictures" in refused(*given)


def test_train_and_what_its_adapter_remembers(tuned, tiny_sd15_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tuned.parent)
    sets = {"data.num_workers": 0, "data.num_examples": 8, "sample.steps": 2, "train.num_threads": 1}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    run = ("--preset", "none", "--model", tiny_sd15_folder, "--device", "cpu", "--batch-size", 2, *words)
    out = tmp_path / "run"
    ok("train", "softrepa", *run, "--unet", tuned.name, "--steps", 1, "--no-eval", "--out", out)
    saved = load_adapter(out)
    assert saved.info.config["model"]["unet"] == str(tuned.resolve())
    monkeypatch.chdir(tmp_path)
    drawing = ("sample", *QUICK, "--prompt", "a red circle", "--adapter", out)
    assert f", unet {tuned.resolve()}: " in ok(*drawing, "--out", tmp_path / "a").stderr
    with pytest.warns(UserWarning, match=r"trained on the denoiser .*checkpoint-100 and is used on the mod"):
        ok(*drawing, "--unet", "", "--out", tmp_path / "b")
    (tmp_path / "list.txt").write_text("a red circle\n")
    own = save_random_adapter(tmp_path / "own", tiny_sd15_folder)
    measuring = ("eval", tmp_path / "list.txt", *QUICK, "--scorers", "none", "--out", tmp_path / "m")
    with pytest.warns(UserWarning, match="trained on the model's own and is used on the denoiser .*check"):
        ok(*measuring, "--adapter", own, "--unet", tuned)


def test_the_same_denoiser_is_no_warning(tuned, tiny_sd15_folder, tmp_path, recwarn):
    adapter = save_random_adapter(tmp_path / "a", tiny_sd15_folder, f"model.unet={tuned}")
    held = ModelSettings(name=str(tiny_sd15_folder), device="cpu", unet=str(tuned))
    restore(load_adapter(adapter), load_model(held))
    assert not [w for w in recwarn.list if "denoiser" in str(w.message)]


def test_what_is_no_denoiser(tuned, tiny_sd15_folder, tiny_sdxl_folder, tmp_path):
    def said(unet: object) -> str:
        return refused(
            "sample", "--model", tiny_sd15_folder, *QUICK, "--prompt", "a", "--unet", unet,
            "--out", tmp_path / "s",
        )  # fmt: skip

    assert "--unet ./nowhere: model folder './nowhere' does not exist" in said("./nowhere")
    assert "--unet nowhere: unknown model 'nowhere'" in said("nowhere")
    assert "UNet" in said(tiny_sdxl_folder) and "SDXL" in said(tiny_sdxl_folder)
    (tmp_path / "empty").mkdir()
    assert "UNet2DConditionModel is wanted here" in said(tmp_path / "empty")
    assert not (tmp_path / "s").exists()
