"""`t2ialign train` with the real method on a tiny random model: run, stop, resume, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from training_helpers import FullDisk, make_coco, trace
from typer.testing import CliRunner

from align_cli import registry
from align_cli.cli.main import app
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.training import checkpoint

STEPS = 6
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    """A run of seconds."""
    sets = {
        "data.num_workers": 0, "data.num_examples": 32, "train.log_every": 1, "train.save_every": 2,
        "sample.steps": 2, "sample.guidance": 1.0, "sample.batch_size": 8, "eval.num_prompts": 8,
        "softrepa.temperature": 0.3, "softrepa.use_t_table": "true", "train.num_threads": 1,
    }  # fmt: skip
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--steps", str(STEPS), "--batch-size", "3"]
    return given + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


def call(*args: object):
    return CliRunner().invoke(app, ["train", "softrepa", *map(str, args)])


def ok(*args: object):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def refused(*args: object) -> str:
    """The one line of a user error."""
    result = call(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, result.stderr
    return said


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C in the middle of a step."""
    real = SoftREPA.step

    def interrupted(self, batch, ctx):
        if ctx.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, ctx)

    monkeypatch.setattr(SoftREPA, "step", interrupted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the run without a stop is put, by whoever needs it first."""
    return tmp_path_factory.mktemp("whole") / "run"


def count_blocks(monkeypatch) -> list[int]:
    """Gets an entry for every call of a transformer block."""
    calls: list[int] = []
    real = BasicTransformerBlock.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    return calls


def whole_trace(whole: Path, options: list[str]) -> list[str]:
    if not whole.exists():
        ok(*options, "--out", whole, "--no-eval")
    return trace(whole)


# ------------------------------------------------------------------ the course of a run


def test_checkpointed_run_has_the_same_trace(options, tmp_path, monkeypatch):
    """Blocks are computed again in the backward pass, and nothing else changes."""
    computed = count_blocks(monkeypatch)
    ok(*options, "--out", tmp_path / "plain", "--no-eval")
    plain = len(computed)
    ok(*options, "--out", tmp_path / "run", "--no-eval", "--set", "train.gradient_checkpointing=true")
    assert len(computed) - plain > plain
    for line, same in zip(trace(tmp_path / "run"), trace(tmp_path / "plain"), strict=True):
        assert json.loads(line + "}") == pytest.approx(json.loads(same + "}"), rel=1e-5)


@pytest.mark.slow
def test_train_evaluates_and_says_where_things_are(tmp_path, options):
    out = tmp_path / "run"
    result = ok(*options, "--out", out, "--set", "train.grid_every=3", "--set", "train.ema_decay=0.5")
    numbers = json.loads((out / "result.json").read_text())
    assert numbers["step"] == STEPS and numbers["method"] == "softrepa" and numbers["train_seconds"] > 0
    assert numbers["evaluation"]["scorers"][0]["headline"] == "shapes/all"
    assert numbers["evaluation"]["arms"][1]["adapters"] == [str(out / "adapter")]
    assert "95 % CI" in result.stdout and "aligned" in result.stdout and "peak memory" in result.stdout
    for name in ("adapter", "result.json", "before-after.png", "eval/report.html"):
        assert str(out / name) in result.stdout and (out / name).exists()
    assert sorted(p.name for p in (out / "grids").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert result.stderr.startswith(f"loading {options[1]} ...\n")
    assert f"step {STEPS}/{STEPS}" in result.stderr
    again = ok(*options[:2], "--out", out, "--resume", "--no-eval")  # finished: saves the adapter anew
    assert json.loads((out / "result.json").read_text())["evaluation"] == numbers["evaluation"]
    assert "adapter:" in again.stdout and "95 % CI" not in again.stdout


def test_the_adapter_holds_what_was_trained(tmp_path, options, tiny_sd15_folder):
    from align_cli.adapters import attach, load_adapter
    from align_cli.models.loading import load_model
    from align_cli.settings import ModelSettings

    out = tmp_path / "run"
    ok(*options, "--out", out, "--no-eval")
    adapter = load_adapter(out / "adapter")
    state = torch.load(out / "checkpoints" / f"step-{STEPS:08d}" / "state.pt", weights_only=True)
    trained = {tuple(t.shape): t for t in state["trainables"]["softrepa"]}
    assert len(adapter.state) == len(trained) == 2
    for value in adapter.state.values():
        torch.testing.assert_close(value, trained[tuple(value.shape)], rtol=0, atol=0)
    model = load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))
    with attach(model, [str(out / "adapter")]):
        pass


@pytest.mark.slow
def test_stop_and_resume_is_bit_identical(tmp_path, options, whole, monkeypatch):
    expected = whole_trace(whole, options)
    assert len(expected) == STEPS
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        assert call(*options, "--out", out, "--no-eval").exit_code == 130
        interrupt_at(patch, 2)
        result = call(*options, "--out", out, "--no-eval", "--resume")  # the same command once more
    assert result.exit_code == 130
    assert f"stopped after step 3 of {STEPS}" in result.stdout
    command = f"t2ialign train softrepa --resume --out {out}"
    assert command in result.stdout
    assert not (out / "adapter").exists()
    ok(*command.split()[3:], "--no-eval")
    assert trace(out) == expected
    same = "checkpoints/step-00000006/state.pt"
    first, second = (torch.load(p / same, weights_only=True)["trainables"]["softrepa"] for p in (whole, out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_ctrl_c_on_the_real_command(tmp_path, options, whole):
    """The very process of `python -m align_cli`, stopped by a signal from outside, and gone on with."""
    out = tmp_path / "cut"
    command = [
        sys.executable,
        "-m",
        "align_cli",
        "train",
        "softrepa",
        *options,
        "--out",
        str(out),
        "--no-eval",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--steps", "100000"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr.decode()
    assert b"go on with: t2ialign train softrepa --resume --out" in stdout
    done = len(trace(out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == f"step-{done:08d}"
    if done < STEPS:
        ok("--resume", "--out", out, "--steps", STEPS, "--no-eval")
    assert trace(out)[:STEPS] == whole_trace(whole, options)


KILL = """
import os, signal, sys
from align_cli.cli.main import main
from align_cli.training import checkpoint
real = checkpoint._HashingFile.write
def write(self, data):
    if "step-00000004" in self.file.name and self.size > 1000:
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, data)
checkpoint._HashingFile.write = write
main()
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_checkpoint(tmp_path, options, whole):
    """The half-written checkpoint is not taken but the one before it; the trace is that of a whole run."""
    out = tmp_path / "cut"
    command = [sys.executable, "-c", KILL, "train", "softrepa", *options, "--out", str(out), "--no-eval"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [".step-00000004.part", "step-00000002"]
    assert (out / "checkpoints" / ".step-00000004.part" / "state.pt").stat().st_size > 1000
    assert len(trace(out)) == 4  # lines that no checkpoint covers
    result = ok("--resume", "--out", out, "--no-eval")
    assert "resumed at step 2" in result.stderr
    assert trace(out) == whole_trace(whole, options)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_full_disk(tmp_path, options, whole, monkeypatch):
    real = checkpoint._HashingFile

    def open_file(file):
        return real(FullDisk(file, 1000) if "step-00000004" in file.name else file)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_HashingFile", open_file)
        result = call(*options, "--out", out, "--no-eval")
    assert result.exit_code == 2 and "the disk is full" in result.stderr and "--resume" in result.stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    ok("--resume", "--out", out, "--no-eval")
    assert trace(out) == whole_trace(whole, options)


def test_a_resumed_run_keeps_its_settings(tmp_path, options, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        call(*options, "--out", out)
    assert "train.lr: 0.001 -> 0.5; a resumed run" in refused("--resume", "--out", out, "--lr", "0.5")
    assert "a resumed run keeps its settings" in refused("--resume", "--out", out, *options, "--seed", "1")
    assert "already holds a run" in refused(*options, "--out", out)
    before = json.loads((out / "run.json").read_text())
    ok("--resume", "--out", out, "--steps", "3", "--no-eval")
    after = json.loads((out / "run.json").read_text())
    assert after["config"]["train"] == before["config"]["train"] | {"steps": 3}
    assert after["origin"] == before["origin"] | {
        "train.steps": "--steps",
        "eval.num_prompts": "--no-eval",
    }
    ok(*options, "--out", out, "--overwrite", "--steps", "1", "--no-eval")
    assert len(trace(out)) == 1


def test_no_eval_is_kept_by_resume_and_one_pair_is_refused_before_anything_is_written(tmp_path, options):
    out = tmp_path / "run"
    assert "train.batch_size must be >= 2" in refused(*options, "--out", out, "--batch-size", "1")
    assert not out.exists()
    ok(*options, "--out", out, "--no-eval", "--steps", "1")
    ok("--resume", "--out", out, "--steps", "2")
    assert json.loads((out / "result.json").read_text())["evaluation"] is None


def test_a_cosine_run_cannot_be_lengthened(tmp_path, options):
    out, cosine = tmp_path / "run", ["--set", "train.lr_schedule=cosine"]
    ok(*options, *cosine, "--out", out, "--no-eval", "--steps", "1")
    assert "was begun with other settings: train.steps: 1 -> 3" in refused(
        "--resume", "--out", out, "--steps", "3"
    )


def test_the_default_folder_names_the_run(tmp_path, options, monkeypatch, tiny_sd15_folder):
    monkeypatch.chdir(tmp_path)
    ok(*options, "--steps", "1", "--seed", "7", "--no-eval")
    ok(*options, "--steps", "2", "--seed", "7", "--no-eval", "--resume")
    assert len(trace(tmp_path / "runs" / f"softrepa-{tiny_sd15_folder.name}-seed7")) == 2
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [f"softrepa-{tiny_sd15_folder.name}-seed7"]


def test_dry_run_prints_origins_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ok("--dry-run", "--no-costs", "--lr", "0.5", "--set", "train.steps=7").stdout
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "0.5" in rows["train.lr"] and "--lr" in rows["train.lr"]
    assert "7" in rows["train.steps"] and "--set" in rows["train.steps"]
    assert "preset softrepa/tiny-sd15" in rows["softrepa.num_tokens"]
    assert "default" in rows["train.adam_eps"]
    assert "runs/softrepa-tiny-sd15-seed42" in text
    assert list(tmp_path.iterdir()) == []


def test_training_on_coco(tmp_path, options):
    root = make_coco(tmp_path / "coco")
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="no caption"):
        result = ok(
            *options, "--out", out, "--data", "coco", "--data-path", root.parent, "--steps", "2",
            "--set", "data.image_size=32", "--set", "data.num_workers=1",
        )  # fmt: skip
    assert len(trace(out)) == 2 and "no paired evaluation" in result.stderr
    assert json.loads((out / "result.json").read_text())["evaluation"] is None


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_a_model_of_the_shapes_world_is_measured_whatever_it_was_trained_on(tmp_path, options, monkeypatch):
    assert registry.is_embedded("tiny-sd15") and not registry.is_embedded("sd15")
    monkeypatch.setattr(registry, "is_embedded", lambda name: name == options[1])
    root, out = make_coco(tmp_path / "coco"), tmp_path / "run"
    coco = ["--data", "coco", "--data-path", root, "--set", "data.image_size=32"]
    assert "no paired evaluation" not in ok(*options, "--out", out, *coco, "--steps", "1").stderr
    found = json.loads((out / "result.json").read_text())["evaluation"]
    assert found["scorers"][0]["headline"] == "shapes/all"


# ------------------------------------------------------------------ bad input


def test_a_batch_that_cannot_be_is_refused_before_the_model_is_loaded(tmp_path, options, monkeypatch):
    monkeypatch.setattr("align_cli.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    assert "fewer than one batch of 33" in refused(*options, "--out", tmp_path / "run", "--batch-size", "33")


def test_user_errors_leave_nothing_behind(tmp_path, options):
    out = tmp_path / "run"

    def error(*more: object) -> str:
        text = refused(*options, "--out", out, *more)
        assert not out.exists()
        return text

    assert "fewer than one batch of 33" in error("--batch-size", "33")
    assert "needs --data-path" in error("--data", "coco")
    assert "does not exist" in error("--data", "coco", "--data-path", tmp_path / "none")
    assert "unknown dataset 'cocoo'; did you mean 'coco'" in error("--data", "cocoo")
    assert "holds no run to resume" in error("--resume")
    assert "train.lr must be > 0" in error("--lr", "-1")
    assert "model.device must be one of auto, cpu" in error("--device", "foo")
    assert "sample.steps must be at most 1000" in error("--set", "sample.steps=1001")
    if not torch.cuda.is_available():
        assert "cuda" in error("--device", "cuda")
    root = make_coco(tmp_path / "coco")
    with pytest.warns(UserWarning, match="no caption"):
        assert "must be a multiple of 4" in error(
            "--data", "coco", "--data-path", root, "--set", "data.image_size=18"
        )


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_a_grid_shows_captions_that_are_not_trained_on(tmp_path, options, monkeypatch):
    shown = []

    def contact_sheet(rows, captions, path, **_):
        shown.append(list(captions))

    monkeypatch.setattr("align_cli.pictures.contact_sheet", contact_sheet)
    few = [*options, "--steps", "2", "--no-eval", "--set", "train.grid_every=1"]
    ok(*few, "--out", tmp_path / "shapes")
    assert len(shown) == 2 and shown[0] == shown[1] and len(shown[0]) == 4
    root = make_coco(tmp_path / "coco")
    coco = [*few, "--data", "coco", "--data-path", root, "--set", "data.image_size=32"]
    assert "note: sample grids" not in ok(*coco, "--out", tmp_path / "coco-val").stderr
    assert shown[-1] == [f"image {i} text 4" for i in (2, 5, 7, 31)]  # of val, there the last is first
    (root / "annotations" / "captions_val2017.json").unlink()
    assert "note: sample grids show training" in ok(*coco, "--out", tmp_path / "coco-train").stderr
    assert [caption[: len("image 2")] for caption in shown[-1][:3]] == ["image 2", "image 5", "image 7"]


def test_a_broken_image_is_named(tmp_path, options):
    root = make_coco(tmp_path / "coco")
    (root / "train2017" / "000000000005.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="no caption"):
        text = call(
            *options, "--out", tmp_path / "run", "--data", "coco", "--data-path", root,
            "--set", "data.image_size=32", "--batch-size", "4",
        )  # fmt: skip
    assert text.exit_code == 2 and "000000000005.jpg is no image" in text.stderr


def test_a_folder_of_other_things_is_left_alone(tmp_path, options):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "is not empty and holds no run" in refused(*options, "--out", mine)
    ok(*options, "--out", mine, "--no-eval", "--overwrite")
    assert (mine / "thesis.txt").read_text() == "years of work" and (mine / "adapter").is_dir()


def test_nan_stops_with_the_last_good_checkpoint(tmp_path, options, monkeypatch):
    real = SoftREPA.contrast

    def broken(self, latents, *rest):
        broken.calls += 1
        return real(self, latents * float("nan") if broken.calls == 4 else latents, *rest)

    broken.calls = 0
    monkeypatch.setattr(SoftREPA, "contrast", broken)
    out = tmp_path / "run"
    result = call(*options, "--out", out, "--no-eval")
    assert result.exit_code == 2 and "the loss is not finite at step 4 of 6" in result.stderr
    assert "step-00000002" in result.stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_flow_model_draws_with_its_own_sampler(tiny_sd3_folder, tmp_path):
    out = tmp_path / "run"
    sets = {
        "data.num_workers": 0, "data.num_examples": 8, "sample.steps": 2, "sample.guidance": 1.0,
        "eval.num_prompts": 4, "softrepa.init": "normal", "softrepa.num_layers": 1, "train.num_threads": 1,
    }  # fmt: skip
    given = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    common = ["--model", tiny_sd3_folder, "--preset", "none", "--steps", 1, "--batch-size", 2, *given]
    assert "sample.sampler ddim is not for flow" in refused(
        *common, "--out", out, "--set", "sample.sampler=ddim"
    )
    assert not out.exists()
    ok(*common, "--out", out)
    saved = json.loads((out / "run.json").read_text())
    assert saved["config"]["sample"]["sampler"] == "euler"
    assert saved["origin"]["sample.sampler"] == "the model"
    assert 'sampler = "euler"' in (out / "config.toml").read_text()
