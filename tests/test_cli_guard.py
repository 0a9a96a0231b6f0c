"""`t2ialign train --guard ...` on a tiny random model, bad input, and how a training stops at its end."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from training_helpers import make_coco, trace
from typer.testing import CliRunner

from align_cli import registry
from align_cli.adapters import load_adapter
from align_cli.cli import train_outcome as command
from align_cli.cli.main import app
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.rewards.base import Reward
from align_cli.training.log import read_metrics

STEPS = 5
GUARD = ["--guard", "tiny-clip", "--guard-every", "2", "--set", "guard.num_prompts=12"]


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    """A run of seconds."""
    sets = {
        "data.num_workers": 0, "data.num_examples": 32, "train.log_every": 1, "train.save_every": 2,
        "train.num_threads": 1, "sample.steps": 2, "sample.guidance": 1.0, "sample.batch_size": 8,
        "eval.num_prompts": 8,
    }  # fmt: skip
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--steps", str(STEPS), "--batch-size", "2"]
    return given + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


def settings_of(method: str) -> list[str]:
    """Quick settings of a method's own."""
    own = {
        "softrepa": {"temperature": 0.3, "use_t_table": "true", "init": "bos+noise"},
        "textcraftor": {
            "steps": 2, "grad_steps": 1, "test_grad_steps": 2, "guidance": 1.0,
            "rewards": "{tiny-clip = 100.0}", "reward_preprocessing": "official",
        },
    }[method]  # fmt: skip
    return [word for key, value in own.items() for word in ("--set", f"{method}.{key}={value}")]


def call(*args: object, method: str = "softrepa"):
    return CliRunner().invoke(app, ["train", method, *map(str, args)])


def ok(*args: object, method: str = "softrepa"):
    result = call(*args, method=method)
    assert result.exit_code == 0, result.output
    return result


def plain(out: Path) -> list[str]:
    """The lines of the training itself."""
    return [line for line in trace(out) if '"guard/' not in line]


def interrupt_at(monkeypatch, step: int) -> None:
    real = SoftREPA.step

    def interrupted(self, batch, ctx):
        if ctx.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, ctx)

    monkeypatch.setattr(SoftREPA, "step", interrupted)


# ------------------------------------------------------------------ a guarded run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["softrepa", "textcraftor"])
def test_a_guard_changes_nothing_of_a_real_training(tmp_path, options, method):
    scorer = "tiny-clip" if method == "softrepa" else "shapes"
    guard = ["--guard", scorer, *GUARD[2:]]
    own = [*options, *settings_of(method), "--no-eval"]
    ok(*own, "--out", tmp_path / "plain", method=method)
    result = ok(*own, *guard, "--out", tmp_path / "guarded", method=method)
    assert plain(tmp_path / "guarded") == trace(tmp_path / "plain")
    first, second = (load_adapter(tmp_path / name / "adapter") for name in ("plain", "guarded"))
    assert first.info.step == second.info.step == STEPS
    assert all(torch.equal(first.state[key], second.state[key]) for key in first.state)
    rows = [row for row in read_metrics(tmp_path / "guarded" / "metrics.jsonl") if "guard_seconds" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5] and rows[-1]["partial"] is True
    names = {key for key in rows[1] if key.count("/") <= 2 and not re.search("change|low|high", key)}
    wanted = {f"guard/{scorer}", "guard/saturation", "guard/clipped", "guard/feature_distance"}
    wanted |= {"guard/reward/tiny-clip"} if method == "textcraftor" else set()
    assert {name for name in names if name.startswith("guard/")} == wanted
    assert f"guard, step 2: {scorer} " in result.stderr and "guard, base model: " in result.stderr
    if method == "textcraftor":
        assert rows[1]["guard/reward/tiny-clip"] != rows[0]["guard/reward/tiny-clip"]


@pytest.mark.slow
def test_the_best_step_becomes_the_adapter(tmp_path, options):
    own = [*options, *settings_of("softrepa"), *GUARD, "--lr", "0.1"]
    ok(*own, "--no-eval", "--out", tmp_path / "last")
    result = ok(*own, "--keep", "best", "--out", tmp_path / "best")
    rows = [row for row in read_metrics(tmp_path / "best" / "metrics.jsonl") if row.get("guard/tiny-clip")]
    best = max(rows[1:], key=lambda row: row["guard/tiny-clip"])["step"]
    adapter = load_adapter(tmp_path / "best" / "adapter")
    numbers = json.loads((tmp_path / "best" / "result.json").read_text())
    assert adapter.info.step == best == numbers["adapter_step"] == numbers["guard"]["best"]["step"]
    assert numbers["step"] == STEPS and numbers["guard"]["keep"] == "best" and numbers["evaluation"]
    assert f"guard: the adapter holds step {best}, the best: held-out tiny-clip" in result.stdout
    assert adapter.info.config["guard"]["scorers"] == ["tiny-clip"]
    # the same from the run that kept the last one
    ok(*own, "--no-eval", "--out", tmp_path / "last", "--resume", "--keep", "best")
    again = load_adapter(tmp_path / "last" / "adapter")
    assert again.info.step == best and again.info.sha256 == adapter.info.sha256


@pytest.mark.slow
def test_stop_and_resume_give_the_same_adapter(tmp_path, options, monkeypatch):
    own = [*options, *settings_of("softrepa"), *GUARD, "--lr", "0.1", "--keep", "best", "--no-eval"]
    ok(*own, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert call(*own, "--out", tmp_path / "cut").exit_code == 130
    ok("--resume", "--out", tmp_path / "cut")
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    first, second = (load_adapter(tmp_path / name / "adapter") for name in ("whole", "cut"))
    assert first.info.step == second.info.step and first.info.sha256 == second.info.sha256


@pytest.mark.slow
def test_real_hacking_is_cried_out(tmp_path, options, monkeypatch):
    """The denoiser learns to draw bright pictures; the held-out scorer wants dark ones."""
    monkeypatch.setitem(registry.REWARDS, "bright", f"{__name__}:bright")
    monkeypatch.setitem(registry.REWARDS, "dark", f"{__name__}:dark")
    sets = {
        "textcraftor.rewards": "{bright = 100.0}", "textcraftor.stage": "unet", "textcraftor.grad_steps": 2,
        "train.save_every": 4,
    }  # fmt: skip
    given = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    more = [*settings_of("textcraftor"), *given, "--steps", "8", "--lr", "0.03", "--no-eval"]
    guard = ["--guard", "dark", "--guard-every", "4", "--keep", "best"]
    result = ok(*options, *more, *guard, "--out", tmp_path / "run", method="textcraftor")
    assert "ALARM at step 8: reward hacking, training gains reward/bright 0." in result.stderr
    assert "while held-out scorer falls: dark 0." in result.stderr
    assert "stop (Ctrl-C) and train with a lower --lr" in result.stderr
    numbers = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 8 in numbers["guard"]["alarms"] and numbers["adapter_step"] == 4 < numbers["step"]
    assert "no step was better than the base model" in result.stdout
    # a second stage may train on something else, but what the first was trained on is not held out from it
    stage = [*options, *settings_of("textcraftor"), "--from", tmp_path / "run", "--guard", "bright"]
    with pytest.warns(UserWarning, match="bright is not held out, this run trains on tiny-clip, bright"):
        ok(*stage, "--guard-every", "4", "--dry-run", "--no-costs", method="textcraftor")


class Brightness(Reward):
    def __init__(self, request, sign: float) -> None:
        facts = {"version": "1", "source": "", "preprocessing": "none", "scale": "[0, 1]"}
        super().__init__(name=request.name, **facts)
        self.sign = sign

    def score(self, images, prompts):
        return 0.5 + self.sign * (images.mean((1, 2, 3)) - 0.5)


def bright(request):
    return Brightness(request, 1.0)


def dark(request):
    return Brightness(request, -1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_a_guard_on_captions_of_coco(tmp_path, options):
    root = make_coco(tmp_path / "coco")
    own = [*options, *settings_of("softrepa"), *GUARD, "--no-eval", "--set", "data.image_size=32"]
    result = ok(*own, "--data", "coco", "--data-path", root, "--out", tmp_path / "run")
    assert "note: the guard has 4 independent prompts, too few" in result.stderr
    assert "4 prompts, 4 of them independent" in result.stderr
    (root / "annotations" / "captions_val2017.json").unlink()
    more = [*own, "--data", "coco", "--data-path", root, "--steps", "1"]
    text = ok(*more, "--out", tmp_path / "without").stderr
    assert "note: the guard measures training captions" in text and "--set guard.prompts=FILE" in text
    (tmp_path / "held-out.txt").write_text("\n".join(f"a picture of {i} things" for i in range(30)))
    named = ["--set", f"guard.prompts={tmp_path / 'held-out.txt'}", "--out", tmp_path / "named"]
    text = ok(*more, *named).stderr
    assert "note:" not in text and "12 prompts, 12 of them independent" in text


# ------------------------------------------------------------------ bad input


@pytest.mark.slow
def test_user_errors_leave_nothing_behind(tmp_path, options):
    out = tmp_path / "run"

    def error(*more: object, method: str = "softrepa") -> str:
        result = call(*options, *settings_of(method), "--no-eval", "--out", out, *more, method=method)
        assert result.exit_code == 2 and result.stdout == "" and not out.exists(), result.output
        return result.stderr.splitlines()[-1]

    assert "unknown reward 'tiny-clop'; did you mean 'tiny-clip'" in error("--guard", "tiny-clop")
    assert "nobody said how often to measure; give --guard-every N" in error("--guard", "tiny-clip")
    assert "guard.every must be >= 0" in error(*GUARD, "--guard-every", "-1")
    assert "guard.scorers names tiny-clip twice" in error(*GUARD, "--guard", "tiny-clip")
    assert "guard.keep must be one of last, best" in error(*GUARD, "--keep", "all")
    assert "guard.num_prompts must be >= 10" in error(*GUARD, "--set", "guard.num_prompts=9")
    wanted = "guard.keep best needs measurements by a held-out scorer: give --guard NAME"
    assert wanted in error("--keep", "best")
    assert wanted in error("--keep", "best", "--guard", "tiny-clip", "--guard-every", "0")
    assert wanted in error("--keep", "best", "--guard-every", "2")
    assert "names clip, which is not among guard.scorers" in error("--set", 'guard.weights={clip = "x"}')
    text = error(*GUARD, "--guard", "clip", "--weights", f"clip={tmp_path}")
    assert "clip" in text and str(tmp_path) in text and "--weights clip=PATH" in text
    assert "none.txt" in error(*GUARD, "--set", f"guard.prompts={tmp_path / 'none.txt'}")
    text = error(*GUARD, "--keep", "best", method="textcraftor")
    assert "needs a held-out scorer, but this run trains on tiny-clip and guard.scorers is tiny-clip" in text
    text = error("--dry-run", "--no-costs", *GUARD, "--keep", "best", method="textcraftor")
    assert "needs a held-out scorer" in text


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_scorer_that_is_trained_on_is_told_and_does_not_decide(tmp_path, options):
    own = [*options, *settings_of("textcraftor"), "--no-eval", "--steps", "2"]
    with pytest.raises(UserWarning, match="tiny-clip is not held out, this run trains on tiny-clip"):
        CliRunner().invoke(
            app, ["train", "textcraftor", *own, *GUARD, "--dry-run", "--no-costs"], catch_exceptions=False
        )
    more = [*own, *GUARD, "--guard", "shapes", "--keep", "best", "--out", tmp_path / "run"]
    with pytest.warns(UserWarning, match="not held out"):
        result = ok(*more, method="textcraftor")
    assert re.search(r"tiny-clip \S+ -> .*\(trained on\)", result.stderr)
    numbers = json.loads((tmp_path / "run" / "result.json").read_text())
    assert numbers["guard"]["decides"] == "shapes"


def test_settings_without_effect_are_warned_of(options):
    with pytest.warns(UserWarning, match=r"guard.scorers \(from --guard\) has no effect: guard.every is 0"):
        ok(*options, "--guard", "tiny-clip", "--guard-every", "0", "--dry-run", "--no-costs")


# ------------------------------------------------------------------ stopping at the end


def test_ctrl_c_in_the_last_step_leaves_the_evaluation_for_resume(tmp_path, options, monkeypatch):
    out = tmp_path / "run"
    own = [*options, *settings_of("softrepa")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, STEPS - 1)
        result = call(*own, "--out", out)
    assert result.exit_code == 130 and not (out / "adapter").exists() and not (out / "eval").exists()
    assert f"stopped after step {STEPS} of {STEPS}" in result.stdout
    hint = f"go on with: t2ialign train softrepa --resume --out {out}"
    assert hint in result.stdout
    before = trace(out)
    result = ok(*hint.split()[6:])
    assert trace(out) == before and "95 % CI" in result.stdout and (out / "adapter").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_closing_evaluation_gives_a_hint(tmp_path, options, monkeypatch, number, code):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def evaluate(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(command, "_evaluate", evaluate)
        result = call(*options, *settings_of("softrepa"), "--steps", "1", "--out", out)
    assert result.exit_code == code, result.output
    assert f"stopped at once; go on with: t2ialign train softrepa --resume --out {out}" in result.stderr
    assert signal.getsignal(signal.SIGTERM) is before
    assert "95 % CI" in ok("--resume", "--out", out).stdout
