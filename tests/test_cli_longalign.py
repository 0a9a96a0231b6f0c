"""`t2ialign train longalign` on a tiny random model: stages, resume, drawing long prompts with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from PIL import Image
from training_helpers import trace

from align_cli.adapters import load_adapter
from align_cli.evaluation.arms import make_arms

LONG = (
    "in this picture there is a red circle . the whole background is plainly black . there are exactly two "
    "objects in total"
)


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    """A run of seconds."""
    sets = {
        "data.num_workers": 0, "data.num_examples": 16, "data.mixture": "long", "train.log_every": 1,
        "train.save_every": 1, "train.num_threads": 1, "sample.steps": 3, "sample.guidance": 2.0,
        "eval.num_prompts": 4, "eval.kinds": '["long"]', "longalign.t5": "embedded:tiny-t5",
        "longalign.token_length": 40, "longalign.adapter_width": 24, "longalign.lora_rank": 2,
    }  # fmt: skip
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--batch-size", "2", "--lr", "1e-2"]
    return given + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


REWARD = ["--reward", "tiny-clip=1", "--set", "longalign.reward_preprocessing=official"]


@pytest.mark.slow
def test_all_stages_one_after_the_other(options, tmp_path):
    """align, then reward, then lcm on it, then reward-lcm; the last one draws in two steps."""
    few = ["--set", "longalign.steps=4", "--set", "longalign.grad_stride=2"]
    stages = {
        "align": (None, []),
        "reward": ("align", [*REWARD, *few]),
        "lcm": ("reward", []),
        "reward-lcm": ("lcm", [*REWARD, "--set", "longalign.steps=2", "--set", "longalign.grad_stride=1"]),
    }
    for stage, (before, more) in stages.items():
        start = ["--from", tmp_path / before] if before else []
        quick = [] if stage == "align" else ["--no-eval"]
        ok("train", "longalign", *options, "--stage", stage, *start, *more, *quick, "--steps", 2,
           "--out", tmp_path / stage)  # fmt: skip
        assert load_adapter(tmp_path / stage).info.stage == stage
    groups = {key.partition(".")[0] for key in load_adapter(tmp_path / "reward-lcm").state}
    assert groups == {"adapter", "align", "reward", "lcm", "unet"}
    assert json.loads((tmp_path / "align" / "result.json").read_text())["evaluation"] is not None
    trained = {s: make_arms([str(tmp_path / s)], [])[1].trained_on for s in ("align", "reward")}
    assert trained == {"align": (), "reward": ("tiny-clip",)}
    drawing = ["--sampler", "lcm", "--spacing", "lcm", "--steps", 2, "--guidance", 1]
    ok("sample", "--prompt", LONG, "--adapter", tmp_path / "reward-lcm", *drawing, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("001-*.png")
    assert Image.open(path).size[0] > 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    """With dropout of captions, LoRA and text adapter."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["train", "longalign", *options, "--no-eval"]
    ok(*given, "--steps", 3, "--out", whole)
    ok(*given, "--steps", 1, "--out", parts)
    ok("train", "longalign", "--resume", "--steps", 3, "--out", parts)
    assert trace(whole) == trace(parts)
    one, two = load_adapter(whole).state, load_adapter(parts).state
    assert all(torch.equal(one[k], two[k]) for k in one | two)


@pytest.mark.slow
def test_what_lies_beyond_the_plain_encoder_changes_the_picture(options, tmp_path):
    """The last sentence of a long prompt is read, which the plain encoder cuts away."""
    more = ["--set", "longalign.token_length=400"]
    ok("train", "longalign", *options, *more, "--no-eval", "--steps", 1, "--out", tmp_path / "run")
    start = " . ".join([LONG] * 5)
    texts = [f"{start} . {last} ." for last in ("a blue square is there", "two yellow triangles are there")]
    said: list[str] = []

    def pictures(name: str, *more: object) -> list[bytes]:
        given = [word for text in texts for word in ("--prompt", text)]
        model = ["--model", options[1], "--steps", 2, "--guidance", 2]
        said.append(ok("sample", *given, *model, "--seed", 1, "--out", tmp_path / name, *more).stderr)
        found = sorted((tmp_path / name).glob("0*.png"))
        return [Image.open(path).tobytes() for path in found]

    plain = pictures("plain")
    assert len(plain) == 2 and plain[0] == plain[1] and "its end is not seen" in said[0]
    long = pictures("long", "--adapter", tmp_path / "run")
    assert len(long) == 2 and long[0] != long[1]
    assert "its end is not seen" not in said[1] and "read as a whole it would lose" in said[1]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(texts))
    given = [file, "--model", options[1], "--steps", 1, "--guidance", 1, "--scorers", "tiny-clip"]
    ok("eval", *given, "--adapter", tmp_path / "run", "--out", tmp_path / "eval")
    audit = json.loads((tmp_path / "eval" / "results.json").read_text())["audit"]
    read = {(tuple(entry["arms"]), entry["what"]): entry["cut"] for entry in audit}
    assert read[("base",), "text encoder"] == 2 and read[("aligned",), "text encoder, by sentence"] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stage", "final"], "longalign.stage must be one of align, reward, lcm, reward-lcm, got 'final'"),
        (["--stage", "final", "--preset", "none"], "longalign.stage must be one of align, reward, lcm"),
        (["--stage", "reward"], "stage reward stands on an earlier one: give its adapter with --from"),
        (["--from", "x"], "stage align stands on no other"),
        (
            ["--model", "tiny-sd3"],
            "longalign does not train tiny-sd3: SD3 reads T5 with up to 512 tokens already",
        ),
        (["--model", "sd35-medium"], "longalign does not train sd35-medium: SD3 reads T5"),
        (["--model", "tiny-sd3", "--preset", "none"], "does not train models of the family sd3"),
        (["--set", "longalign.t5=nowhere"], "no T5 'nowhere': there is no such folder; get it with"),
        (["--data", "prompts", "--data-path", "list.txt"], "trains on pictures with captions"),
        (["--stage", "reward", "--from", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", "longalign", *args, "--no-eval")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("stage", ["align", "reward", "lcm", "reward-lcm"])
@pytest.mark.parametrize("model", ["sd15", "tiny-sd15"])
def test_every_stage_has_its_preset(model, stage):
    start = [] if stage == "align" else ["--from", "x"]
    result = ok("train", "longalign", "--model", model, "--stage", stage, *start, "--dry-run", "--no-costs")
    assert f"preset longalign/{model}-{stage}" in result.stdout
