"""`t2ialign train textcraftor` on a tiny random model: stages, rewards, resume, drawing with the result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from PIL import Image
from training_helpers import make_coco, trace

from align_cli.adapters import load_adapter
from align_cli.evaluation.arms import make_arms


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    """A run of seconds."""
    sets = {
        "data.num_workers": 0, "data.num_examples": 16, "train.log_every": 1, "train.save_every": 1,
        "sample.steps": 4, "sample.guidance": 2.0, "eval.num_prompts": 4, "textcraftor.steps": 4,
        "textcraftor.grad_steps": 2, "textcraftor.test_grad_steps": 2, "train.num_threads": 1,
        "textcraftor.reward_preprocessing": "official",
    }  # fmt: skip
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--batch-size", "2", "--lr", "1e-2"]
    given += ["--reward", "tiny-clip=10"]
    return given + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_stages_one_after_the_other(options, tmp_path):
    text, unet = tmp_path / "text", tmp_path / "unet"
    ok("train", "textcraftor", *options, "--steps", 2, "--out", text)
    adapter = load_adapter(text)
    assert adapter.info.stage == "text"
    assert {key.partition(".")[0] for key in adapter.state} == {"text_encoder"}
    assert json.loads((text / "result.json").read_text())["evaluation"] is not None
    (arm,) = make_arms([str(text)], [])[1:]
    assert arm.trained_on == ("tiny-clip",)
    ok("train", "textcraftor", *options, "--stage", "unet", "--from", text, "--steps", 1, "--out", unet)
    second = load_adapter(unet)
    assert second.info.stage == "unet"
    key = next(k for k in adapter.state if k.startswith("text_encoder."))
    assert torch.equal(second.state[key], adapter.state[key])


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_captions_of_coco_without_its_pictures(options, tmp_path):
    root = make_coco(tmp_path / "coco")
    given = ["train", "textcraftor", *options, "--no-eval", "--steps", 1, "--data", "coco", "--data-path"]
    ok(*given, root, "--out", tmp_path / "whole")
    shutil.rmtree(root / "train2017")
    shutil.rmtree(root / "val2017")
    ok(*given, root, "--out", tmp_path / "alone", "--set", "train.grid_every=1")
    assert trace(tmp_path / "whole") == trace(tmp_path / "alone")


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["train", "textcraftor", *options, "--no-eval", "--set", "textcraftor.lora_rank=2"]
    ok(*given, "--steps", 3, "--out", whole)
    ok(*given, "--steps", 1, "--out", parts)
    ok("train", "textcraftor", "--resume", "--steps", 3, "--out", parts)
    assert trace(whole) == trace(parts)
    one, two = load_adapter(whole).state, load_adapter(parts).state
    assert all(torch.equal(one[k], two[k]) for k in one | two)


@pytest.mark.slow
def test_drawing_with_the_switch(options, tmp_path):
    run = tmp_path / "run"
    ok("train", "textcraftor", *options, "--no-eval", "--steps", 2, "--out", run)
    base = ["sample", "--prompt", "a red circle", "--out"]

    def picture(name: str, *more: object) -> bytes:
        ok(*base, tmp_path / name, *more)
        (path,) = (tmp_path / name).glob("001-*.png")
        return Image.open(path).tobytes()

    model = [
        "--model",
        options[1],
        "--steps",
        4,
        "--guidance",
        2,
        "--sampler",
        "ddim",
        "--spacing",
        "leading",
    ]
    plain = picture("plain", *model)
    usual, early = picture("usual", "--adapter", run), picture("early", "--adapter", run, "--from-step", 0)
    half = picture("half", "--adapter", f"{run}@0.5", "--adapter", f"{run}@0.5")
    assert len({plain, usual, early}) == 3
    assert picture("none", "--adapter", f"{run}@0") == plain
    halves = [abs(a - b) for a, b in zip(half, usual, strict=True)]
    assert max(halves) <= 1  # two halves of one encoder are that encoder, to rounding
    (path,) = (tmp_path / "early").glob("001-*.png")
    assert "from_step 0" in Image.open(path).text["sampling"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "softrepa", "--reward", "clip=1"], "--reward is no option of softrepa"),
        (["train", "softrepa", "--stage", "text"], "--stage is no option of softrepa"),
        (["train", "textcraftor", "--reward", "clip"], "--reward clip: write NAME=WEIGHT"),
        (["train", "textcraftor", "--reward", "clip=nan"], "--reward clip=nan: the weight must be a finite"),
        (["train", "textcraftor", "--reward", "hspv2=1"], "unknown reward 'hspv2'; did you mean 'hpsv2'"),
        (["train", "textcraftor", "--reward", "clip=-1"], "sum above 0"),
        (["train", "textcraftor", "--stage", "both"], "must be one of text, unet, joint"),
        (["train", "textcraftor", "--set", "textcraftor.grad_steps=99"], "grad_steps must be between 1 and"),
        (["train", "textcraftor", "--weights", "clip"], "write --weights NAME=PATH"),
        (["train", "textcraftor", "--from", "nowhere", "--no-eval"], "nowhere does not exist"),
        (["sample", "--prompt", "x", "--from-step", "3"], "there is no --adapter"),
    ],
)
def test_wrong_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*args)
    assert not list(Path().iterdir())


def test_the_preset_of_sd15_is_the_papers():
    result = ok("train", "textcraftor", "--model", "sd15", "--dry-run", "--no-costs")
    assert "preset textcraftor/sd15-paper" in result.stdout
    assert re.search(r'textcraftor.rewards +\{"clip-g14": 100.0, "aesthetic": 1.0', result.stdout)
    assert "textcraftor-text-sd15-seed42" in result.stdout
