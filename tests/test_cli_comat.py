"""`t2ialign train comat` on a tiny random model: all three losses, resume, drawing, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from PIL import Image
from training_helpers import trace

from align_cli.adapters import load_adapter

SETS = {
    "data.num_workers": 0, "data.num_examples": 16, "train.log_every": 1, "train.save_every": 1,
    "train.num_threads": 1, "sample.steps": 3, "sample.guidance": 2.0, "eval.num_prompts": 4,
    "comat.lora_rank": 2, "comat.steps": 3, "comat.grad_steps": 2, "comat.guidance": 2.0,
    "comat.rewards": "{tiny-blip=1.0}", "comat.parser": "shapes", "comat.masker": "shapes",
    "comat.real": "drawn",
}  # fmt: skip


def given(model: Path, **changes: object) -> list[str]:
    """A run of seconds."""
    sets = SETS | {key.replace("__", "."): value for key, value in changes.items()}
    words = [
        "--model",
        str(model),
        "--preset",
        "none",
        "--batch-size",
        "2",
        "--lr",
        "1e-2",
        "--data",
        "shapes",
    ]
    return words + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    return given(tiny_sd15_folder)


@pytest.mark.slow
def test_train_then_draw(options, tmp_path):
    ok("train", "comat", *options, "--steps", 2, "--out", tmp_path / "run")
    adapter = load_adapter(tmp_path / "run")
    assert {key.partition(".")[0] for key in adapter.state} == {"unet"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["evaluation"] is not None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "reward/tiny-blip", "loss/fidelity", "discriminator/loss"} <= lines[0].keys()
    assert any("loss/token" in line for line in lines)
    pictures = []
    for name, more in (("base", []), ("tuned", ["--adapter", tmp_path / "run"])):
        ok("sample", "--model", options[1], "--prompt", "a red circle", *more, "--out", tmp_path / name)
        pictures.append(Image.open(next((tmp_path / name).glob("0*.png"))).tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    """Discriminator and its optimiser included."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", "comat", *options, "--no-eval"]
    ok(*command, "--steps", 3, "--out", whole)
    ok(*command, "--steps", 1, "--out", parts)
    ok("train", "comat", "--resume", "--steps", 3, "--out", parts)
    assert trace(whole) == trace(parts)
    one, two = load_adapter(whole).state, load_adapter(parts).state
    assert all(torch.equal(one[k], two[k]) for k in one | two)


def test_prompt_lists_with_blanks_and_duplicates_and_prompts_without_nouns(tiny_sd15_folder, tmp_path):
    """As the published list has them; a parser that reads any text."""
    path = tmp_path / "list.txt"
    path.write_text("a red circle\n\na red circle\n   \nrun, quickly\na blue square . \n")
    more = given(tiny_sd15_folder, comat__parser="plain", data__num_examples=0)
    ok(
        "train", "comat", *more, "--data", "prompts", "--data-path", path, "--no-eval", "--steps", 3, "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert load_adapter(tmp_path / "run").state


def test_latents_made_beforehand(tiny_sd15_folder, tmp_path):
    """encode --for comat, then train from its folder."""
    path = tmp_path / "list.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")
    data = ["--data", "prompts", "--data-path", path]
    ok(
        "encode", "--for", "comat", "--model", tiny_sd15_folder, *data, "--steps", 2, "--batch-size", 2,
        "--out", tmp_path / "latents",
    )  # fmt: skip
    more = given(tiny_sd15_folder, comat__real="stored", data__num_examples=0)
    ok(
        "train", "comat", *more, *data, "--cache", tmp_path / "latents", "--no-eval", "--steps", 2, "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert load_adapter(tmp_path / "run").state


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "comat.real=stored"], "make them with t2ialign encode --for comat"),
        (
            ["--model", "tiny-sd3", "--set", 'comat.attention_layers=["mid_8"]'],
            "tiny-sd3 has no cross-attention mid_8 at this picture size (it has joint_",
        ),
        (["--set", "comat.rewards={clipp=1}"], "unknown reward 'clipp'"),
        (["--set", "comat.masker=grounded-sam", "--set", "comat.detector=nowhere"], "comat.detector"),
        (["--set", "comat.masker=sam"], "comat.masker must be one of auto, grounded-sam, shapes"),
        (["--set", "comat.parser=stanza"], "comat.parser must be one of"),
        (["--set", 'comat.attention_layers=["up_64"]'], "has no cross-attention up_64"),
        (["--set", "comat.lora_rank=4096"], "comat.lora_rank must be at most"),
        (["--set", "comat.discriminator=nowhere"], "comat.discriminator: unknown model 'nowhere'"),
        (["--set", "comat.discriminator=tiny-sd3"], "it must be a UNet"),
        (["--from", "nowhere"], "nowhere does not exist"),
        (["--text", "segments"], "attribute concentration knows the tokens"),
        (["--stage", "final"], "--stage is no option of comat"),
    ],
)
def test_wrong_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", "comat", *args, "--no-eval")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("model", ["sd15", "sdxl", "tiny-sd15", "tiny-sdxl"])
def test_every_model_has_its_preset(model):
    more = ["--set", "comat.real=drawn"] if not model.startswith("tiny") else []
    assert (
        f"preset comat/{model}"
        in ok("train", "comat", "--model", model, "--dry-run", "--no-costs", *more).stdout
    )


def test_official_values():
    """scripts/sd15.sh and sdxl.sh."""
    from align_cli import config

    for model, lr, lr_d, weight, batch in (("sd15", 5e-5, 2e-5, 1.0, 4), ("sdxl", 2e-5, 5e-5, 0.5, 6)):
        r = config.resolve("comat", preset=f"comat/{model}")
        m = r.method_config
        assert (r.train.lr, m.lr_discriminator, m.fidelity_weight, r.train.batch_size) == (
            lr,
            lr_d,
            weight,
            batch,
        )
        assert r.train.batch_size * r.train.accumulation == 8 * batch  # of 8 processes
        assert (r.train.steps, r.train.max_grad_norm, r.train.weight_decay) == (2000, 0.1, 0.01)
        assert (m.steps, m.grad_steps, m.guidance, m.lora_rank, m.attention_steps) == (50, 5, 7.5, 128, 2)
        assert (m.token_weight, m.pixel_weight, m.detach_input) == (1e-3, 5e-5, model == "sdxl")
        assert m.rewards == {"blip-caption": 1.0} and m.discriminator == ("sd15" if model == "sdxl" else "")
