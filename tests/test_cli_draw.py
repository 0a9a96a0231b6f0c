"""`t2ialign sample`: the real command on tiny random models and a SoftREPA adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from softrepa_helpers import save_random_adapter
from typer.testing import CliRunner

from align_cli import config
from align_cli.adapters import save_adapter
from align_cli.cli.main import app
from align_cli.cli.train_work import with_own_sampling
from align_cli.drawing import make_plan
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.loading import load_model
from align_cli.pictures import read_metadata
from align_cli.settings import ModelSettings

QUICK = ("--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory) -> Path:
    """A SoftREPA adapter with its own settings of drawing."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return save_random_adapter(folder, tiny_sd15_folder, "sample.guidance=2.5", "sample.batch_size=8")


def call(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def assert_one_line(result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)  # a mistake that only the model can tell
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    for part in parts:
        assert part in said


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "sampler"), [("tiny_sdxl_folder", "ddim"), ("tiny_sd3_folder", "euler")])
def test_sample_draws_with_every_family(folder, sampler, tmp_path, request):
    folder = request.getfixturevalue(folder)
    one = ("sample", "--model", folder, *QUICK, "--prompt", "a red circle", "--prompt", "a blue square")
    result = call(*one, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.stderr
    assert f": {sampler}, 2 steps" in result.stderr
    name = "001-a-red-circle-seed42.png"
    facts = read_metadata(tmp_path / "a" / name)
    assert facts["sampling"].startswith(f"sampler {sampler}, ")
    assert ("spacing" in facts["sampling"]) == (sampler == "ddim")
    assert pixels(tmp_path / "a" / name).shape == (32, 32, 3)
    assert call(*one, "--out", tmp_path / "b", "--batch-size", 1).exit_code == 0
    apart = pixels(tmp_path / "b" / name).astype(int) - pixels(tmp_path / "a" / name)
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.001
    assert_one_line(call(*one, "--sampler", "ddpm" if sampler == "euler" else "euler"), "draws with", sampler)
    assert_one_line(call(*one, "--image-size", "33"), "multiple of")


def test_recorded_settings_that_nobody_chose_leave_the_sampler_to_the_model(tiny_sd3_folder, tmp_path):
    model = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu"))
    resolved = config.resolve(
        "softrepa",
        preset="none",
        sets=["softrepa.num_layers=2", "softrepa.init=normal"],
        flags={"model.name": str(tiny_sd3_folder)},
    )
    assert resolved.sample.sampler == "ddim"
    method = SoftREPA(model, resolved.method_config)
    save_adapter(tmp_path / "one", method, resolved.to_dict(), resolved.origin)
    args = ("sample", "--adapter", tmp_path / "one", *QUICK, "--prompt", "a red circle")
    result = call(*args, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.stderr
    assert ": euler, 2 steps" in result.stderr


@pytest.mark.parametrize(("sampler", "spacing"), [("lcm", "lcm"), ("unipc", "linspace")])
def test_a_sampler_with_its_own_spacing_leaves_that_of_a_preset(sampler, spacing, tiny_models):
    """What a preset says of spacing, it says of its own sampler."""
    resolved = config.resolve(
        "textcraftor", preset="textcraftor/tiny-sd15", sets=[f"sample.sampler={sampler}"]
    )
    assert resolved.sample.spacing == "leading"
    found = with_own_sampling(resolved, tiny_models["sd15"])
    assert (found.sample.sampler, found.sample.spacing) == (sampler, spacing)
    chosen = config.resolve(
        "textcraftor",
        preset="textcraftor/tiny-sd15",
        sets=[f"sample.sampler={sampler}", "sample.spacing=trailing"],
    )
    assert with_own_sampling(chosen, tiny_models["sd15"]).sample.spacing == "trailing"
    plan = make_plan("sd15", [], {}, {"sampler": sampler, "steps": 4})
    assert plan.sample.spacing == spacing and "spacing" in plan.open_keys
    plan = make_plan("sd15", [], {}, {"sampler": sampler, "steps": 4, "spacing": "trailing"})
    assert plan.sample.spacing == "trailing" and "spacing" not in plan.open_keys
    plan = make_plan("sd15", [], {}, {"sampler": "ddpm"})
    assert plan.sample.spacing == "leading" and "spacing" not in plan.open_keys


def test_sample_with_lcm_and_unipc(tiny_sd15_folder, tmp_path):
    base = ("sample", "--model", tiny_sd15_folder, "--device", "cpu", "--prompt", "a red circle")
    given = {"lcm": ("--steps", 4, "--guidance", 1), "unipc": ("--steps", 5, "--eta", 0.5)}
    for sampler, more in given.items():
        result = call(*base, "--sampler", sampler, *more, "--out", tmp_path / sampler)
        assert result.exit_code == 0, result.stderr
        facts = read_metadata(tmp_path / sampler / "001-a-red-circle-seed42.png")
        spacing = {"lcm": "lcm", "unipc": "linspace"}[sampler]
        assert facts["sampling"].startswith(f"sampler {sampler}, spacing {spacing}, steps {more[1]}, ")
        assert "eta" not in facts["sampling"] and "note:" not in result.stderr
    nothing = call(*base, "--sampler", "lcm", "--steps", 1, "--guidance", 0, "--out", tmp_path / "nothing")
    assert "note: --guidance 0 leaves out the prompt; " in nothing.stderr and nothing.exit_code == 0
    assert_one_line(call(*base, "--sampler", "lcm", "--steps", 51), "at most 50 with spacing lcm, got 51")
    assert_one_line(call(*base, "--spacing", "lcm"), "spacing lcm is for sampler lcm alone")
    assert_one_line(call(*base, "--sampler", "unipc", "--steps", 1000), "steps must be at most 999")


def test_sample_base(tiny_sd15_folder, tmp_path):
    out = tmp_path / "out"
    args = ("sample", "--model", tiny_sd15_folder, *QUICK, "--out", out, "--n", 2, "--seed", 5)
    result = call(*args, "--prompt", "a red circle", "--prompt", "two  Blue/squares")
    assert result.exit_code == 0, result.stderr
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        "001-a-red-circle-seed5.png",
        "001-a-red-circle-seed6.png",
        "002-two-blue-squares-seed5.png",
        "002-two-blue-squares-seed6.png",
        "sheet.png",
    ]
    assert str(out / "sheet.png") in result.stdout
    facts = read_metadata(out / names[1])
    assert facts["prompt"] == "a red circle"
    assert facts["seed"] == "6"
    assert facts["model"] == str(tiny_sd15_folder)
    assert "steps 2" in facts["sampling"]
    assert facts["adapter"] == "none"
    assert_one_line(call(*args, "--prompt", "a red circle"), "already holds", "--overwrite")
    first = pixels(out / names[1])
    assert call(*args, "--prompt", "a red circle", "--overwrite", "--batch-size", 1).exit_code == 0
    assert np.abs(pixels(out / names[1]).astype(int) - first).max() <= 1


def test_sample_compare_and_scale(adapter, tmp_path):
    result = call(
        "sample",
        "--adapter",
        adapter,
        "--prompt",
        "a red circle",
        *QUICK,
        "--compare",
        "--out",
        tmp_path / "o",
    )
    assert result.exit_code == 0, result.stderr
    base = tmp_path / "o" / "001-a-red-circle-seed42-base.png"
    aligned = tmp_path / "o" / "001-a-red-circle-seed42-aligned.png"
    assert not np.array_equal(pixels(base), pixels(aligned))
    assert "adapter" not in read_metadata(base)
    info = json.loads((adapter / "adapter.json").read_text())
    assert str(adapter) in read_metadata(aligned)["adapter"]
    assert info["sha256"] in read_metadata(aligned)["adapter"]
    assert "guidance 2.5" in read_metadata(aligned)["sampling"]
    assert "guidance 2.5" in result.stderr  # recorded with the adapter
    off = call(
        "sample", "--adapter", f"{adapter}@0", "--prompt", "a red circle", *QUICK, "--out", tmp_path / "p"
    )
    assert off.exit_code == 0, off.stderr


def test_sample_default_folder_never_overwrites(tiny_sd15_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call("sample", "--model", tiny_sd15_folder, *QUICK, "--prompt", "a red circle").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples", "samples-2"]


def test_sample_warns_of_a_cut_prompt(tiny_sd15_folder, tmp_path):
    long = " ".join(["a red circle and"] * 40)
    result = call("sample", "--model", tiny_sd15_folder, *QUICK, "--prompt", long, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "its end is not seen" in result.stderr


@pytest.mark.slow
def test_sample_bad_input(tiny_sd15_folder, adapter, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n\n")
    latin.write_bytes(b"caf\xe9")
    (tmp_path / "file").write_text("")
    base = ("sample", "--model", tiny_sd15_folder, *QUICK)
    assert_one_line(call(*base), "nothing to draw", "--prompt")
    assert_one_line(call(*base, "--prompt", " "), "--prompt is empty")
    assert_one_line(call(*base, "--prompts", empty), "holds no prompt", "empty.txt")
    assert_one_line(call(*base, "--prompts", latin), "not UTF-8", "line 1")
    assert_one_line(call(*base, "--prompts", tmp_path / "no.txt"), "no prompt file")
    one = (*base, "--prompt", "a red circle")
    assert_one_line(call(*one, "--compare"), "--adapter")
    assert_one_line(call(*one, "--sampler", "heun"), "ddim, ddpm, unipc, lcm, euler")
    assert_one_line(call(*one, "--sampler", "euler"), "is for flow-matching models", "ddim, ddpm")
    assert_one_line(call(*one, "--image-size", "33", "--out", tmp_path / "s"), "multiple of")
    assert_one_line(call(*one, "--adapter", tmp_path / "nothing"), "nothing")
    assert_one_line(call(*one, "--adapter", f"{adapter}@lots"), "lots")
    assert_one_line(call(*one, "--out", tmp_path / "file"), "not a folder")
    assert_one_line(call("sample", "--model", "tiny-sd51", "--prompt", "x"), "tiny-sd15")


@pytest.mark.slow
def test_a_folder_of_others_is_refused(tiny_sd15_folder, adapter, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    drawn = ("sample", "--model", tiny_sd15_folder, *QUICK, "--prompt", "a red circle", "--out")
    assert_one_line(call(*drawn, tmp_path), "holds nothing that t2ialign wrote", "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert call(*drawn, tmp_path, "--overwrite").exit_code == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert call(*drawn, run).exit_code == 0
    assert call(*drawn, adapter).exit_code == 0


def test_the_sheet_names_the_adapter_once(adapter):
    plan = make_plan(None, [f"{adapter}@0.5"], {}, {})
    assert plan.title().count(str(adapter)) == 1
    assert plan.describe().count(str(adapter)) == 1


def test_a_wrong_base_model_is_blamed_on_the_adapter(adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    info = json.loads((broken / "adapter.json").read_text())
    for model_id, part in (
        ("tiny-sd51", "did you mean 'tiny-sd15'"),
        ("/gone", "does not exist"),
        ("", "''"),
    ):
        (broken / "adapter.json").write_text(json.dumps(info | {"model_id": model_id}))
        refused = call("sample", "--adapter", broken, "--prompt", "a red circle")
        assert_one_line(refused, str(broken), "model_id of adapter.json", part)


def test_an_adapter_finds_its_base_model_from_anywhere(adapter, tiny_sd15_folder, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    info = json.loads((moved / "adapter.json").read_text())
    info["config"]["model"]["name"] = "models/tiny"  # as typed where it was trained
    (moved / "adapter.json").write_text(json.dumps(info))
    plan = make_plan(None, [str(moved)], {}, {})
    assert plan.model.name == info["model_id"] == str(tiny_sd15_folder)
