"""The training loop with a small real method: traces, stopping, resuming, bad numbers, bad folders."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from rich.console import Console
from training_helpers import FullDisk, LinearMap, Points, settings, trace

from align_cli.errors import UserError
from align_cli.training import checkpoint, log, loop, run_folder
from align_cli.training.log import duration_text, rate_text, read_metrics
from align_cli.training.loop import train

CONFIG = {"method": "linear", "train": {"lr": 0.05, "steps": 12}, "model": {"device": "cpu"}}


def run(out: Path, *, method=None, dataset=None, config=CONFIG, changes=None, **options):
    method = method or LinearMap()
    text = "# config\n"
    chosen = settings(**(changes or {}))
    result = train(
        method, dataset or Points(), chosen, out, config=config, config_text=lambda _origin: text, **options
    )
    return method, result


def stop_at(step: int, number: int = signal.SIGINT):
    """A hook that sends this process a signal in the middle of a step."""

    def hook(ctx, loss):
        if ctx.step == step:
            os.kill(os.getpid(), number)
        return loss

    return hook


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


# ------------------------------------------------------------------ the course of a run


def test_a_run_learns_and_leaves_its_files(tmp_path):
    out = tmp_path / "deep" / "run"
    before = LinearMap().weight.detach().clone()
    method, result = run(out, changes={"steps": 200, "save_every": 90, "log_every": 50})
    assert result.step == 200 and result.signal == 0 and result.resumed_from == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows] == [50, 100, 150, 200]
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert set(rows[0]) == {"step", "lr", "loss", "noise", "grad_norm", "seconds"}
    assert not torch.equal(before, method.weight)
    assert torch.equal(method.bias, torch.zeros(3))  # not among the trainables
    assert checkpoints(out) == ["step-00000180", "step-00000200"]
    assert result.checkpoint == out / "checkpoints" / "step-00000200"
    assert json.loads((out / "run.json").read_text())["data_fingerprint"] == "points-20"
    assert (out / "config.toml").read_text() == "# config\n"
    assert result.metrics["loss"] == rows[-1]["loss"]


def test_the_same_seed_gives_the_same_trace(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, changes={"seed": seed})
    assert trace(tmp_path / "a") == trace(tmp_path / "b") != trace(tmp_path / "c")


def test_loader_processes_change_nothing(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", num_workers=1)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


VARIANTS = {
    "plain": {},
    "schedule": {"lr_schedule": "cosine-restarts", "lr_every": 2, "lr_period": 3, "lr_warmup": 2},
    "window": {"log_every": 5, "save_every": 3},
    "accumulation": {"accumulation": 3},
    "ema": {"ema_decay": 0.9, "max_grad_norm": 0.1},
    "fp16": {"precision": "fp16", "log_every": 2},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_run_stop_resume_is_bit_identical(tmp_path, changes):
    """Ctrl-C in the middle of step 7, go on: the same lines in metrics.jsonl and the same tensors."""
    whole, _ = run(tmp_path / "whole", changes=changes)
    _, stopped = run(tmp_path / "cut", method=LinearMap(hook=stop_at(6)), changes=changes)
    assert stopped.step == 7 and stopped.signal == signal.SIGINT
    assert stopped.checkpoint == tmp_path / "cut" / "checkpoints" / "step-00000007"
    second, result = run(tmp_path / "cut", changes=changes, resume=True)
    assert result.step == 12 and result.resumed_from == 7
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert torch.equal(whole.weight, second.weight)


def test_more_steps_go_on_as_if_never_stopped(tmp_path):
    changes = {"log_every": 5}
    run(tmp_path / "whole", changes=changes | {"steps": 12})
    run(tmp_path / "cut", changes=changes | {"steps": 7})
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["partial"] is True
    run(tmp_path / "cut", changes=changes | {"steps": 12}, resume=True)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first, _ = run(tmp_path, changes={"log_every": 5, "ema_decay": 0.9})
    before = trace(tmp_path)
    second, result = run(tmp_path, changes={"log_every": 5, "ema_decay": 0.9}, resume=True)
    assert trace(tmp_path) == before and result.step == 12 and result.metrics["loss"] > 0
    assert torch.equal(first.weight, second.weight)


def test_accumulation_averages_slices(tmp_path):
    """Two slices of 4 without noise in the batch order give the gradient of their mean."""
    seen = []

    def hook(ctx, loss):
        seen.append((ctx.step, ctx.rng.initial_seed()))
        return loss

    method, _ = run(tmp_path, method=LinearMap(hook=hook), changes={"steps": 2, "accumulation": 2})
    assert [s for s, _ in seen] == [0, 0, 1, 1] and len({r for _, r in seen}) == 4
    assert len(method.seen) == 4 and len({i for ids in method.seen for i in ids}) == 16


def test_clipping_and_groups(tmp_path):
    method, _ = run(tmp_path / "a", method=LinearMap(groups=2), changes={"steps": 3, "max_grad_norm": 0.01})
    row = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert row["map/grad_norm"] > 0.01 and row["bias/grad_norm"] > 0.01
    assert method.bias.abs().sum() > 0
    # the loss of one group gives no gradient to the other: the map learns as it does alone, at step 1
    run(tmp_path / "b", changes={"steps": 1})
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[0]["grad_norm"] == row["map/grad_norm"]


def test_a_group_has_a_learning_rate_of_its_own(tmp_path):
    """AdamW's first step is the learning rate (times a sign), whatever the gradient."""
    method = LinearMap(groups=2)
    method.options = {"bias": {"lr": 0.003, "weight_decay": 0.0}}
    run(tmp_path, method=method, changes={"steps": 1, "lr": 0.05, "weight_decay": 0.5})
    torch.testing.assert_close(method.bias.abs(), torch.full_like(method.bias, 0.003), rtol=1e-4, atol=0)


def test_ema_ends_in_the_method_and_in_the_grid(tmp_path):
    drawn = []
    method = LinearMap()

    def grid(step, path):
        drawn.append((step, path, method.weight.detach().clone()))
        path.write_bytes(b"png")

    changes = {"ema_decay": 0.9, "grid_every": 6}
    run(tmp_path, method=method, changes=changes, grid=grid)
    assert [(s, p.name) for s, p, _ in drawn] == [(6, "step-00000006.png"), (12, "step-00000012.png")]
    state = torch.load(tmp_path / "checkpoints" / "step-00000012" / "state.pt", weights_only=True)
    assert torch.equal(state["ema"]["average"][0], method.weight)
    assert torch.equal(drawn[1][2], method.weight)
    assert not torch.equal(state["trainables"]["map"][0], method.weight)


# ------------------------------------------------------------------ stopping, crashing


def test_sigterm_saves_and_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    _, result = run(tmp_path, method=LinearMap(hook=stop_at(2, signal.SIGTERM)))
    assert result.step == 3 and result.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path):

    def hook(ctx, loss):
        if ctx.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return loss

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, method=LinearMap(hook=hook))
    assert checkpoints(tmp_path) == ["step-00000004"]


def test_a_crash_before_the_first_checkpoint_starts_again(tmp_path):
    def crash(ctx, loss):
        if ctx.step == 2:
            raise RuntimeError("bug")
        return loss

    with pytest.raises(RuntimeError, match="bug"):
        run(tmp_path / "cut", method=LinearMap(hook=crash))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    _, result = run(tmp_path / "cut", resume=True)
    run(tmp_path / "whole")
    assert result.resumed_from == 0 and trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "cut", method=LinearMap(hook=stop_at(8)))
    (tmp_path / "cut" / "checkpoints" / "step-00000009" / "state.pt").write_bytes(b"half")
    console = Console(file=io.StringIO(), width=100)
    _, result = run(tmp_path / "cut", resume=True, console=console)
    assert result.resumed_from == 8 and trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert "step-00000009 is damaged" in console.file.getvalue()


def test_a_damaged_checkpoint_never_outlives_a_whole_one(tmp_path):
    """With one that is kept: the damaged one of step 8 is the newest by its name, that of step 2 is whole."""
    run(tmp_path, changes={"steps": 8, "save_every": 8, "keep_checkpoints": 1})
    (tmp_path / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"")
    changes = {"steps": 8, "save_every": 2, "keep_checkpoints": 1}
    method = LinearMap(hook=stop_at(2))
    run(tmp_path, method=method, changes=changes, resume=True)
    assert checkpoints(tmp_path) == ["step-00000003"]
    _, result = run(tmp_path, changes=changes, resume=True)
    assert result.resumed_from == 3 and result.step == 8


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = checkpoint._HashingFile

    def open_file(file):
        return real(FullDisk(file, 200) if "step-00000008" in file.name else file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_HashingFile", open_file)
        with pytest.raises(UserError) as caught:
            run(tmp_path / "cut")
    assert "disk is full" in str(caught.value) and "step-00000004" in str(caught.value)
    assert checkpoints(tmp_path / "cut") == ["step-00000004"]
    _, result = run(tmp_path / "cut", resume=True)
    run(tmp_path / "whole")
    assert result.resumed_from == 4 and trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_a_full_disk_under_the_log(tmp_path):
    run(tmp_path, changes={"steps": 4})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = loop.MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="the disk is full.*--resume"):
        log.append({"step": 1})


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda ctx, loss: loss * float("nan") if ctx.step == 6 else loss, "is not finite at step 7 of 12"),
        (lambda ctx, loss: loss * float("inf") if ctx.step == 6 else loss, "the loss is not finite"),
    ],
    ids=["nan", "inf"],
)
def test_bad_numbers_stop_before_they_reach_the_weights(tmp_path, hook, words):
    method = LinearMap(hook=hook)
    with pytest.raises(UserError, match=words) as caught:
        run(tmp_path, method=method)
    assert "step-00000004" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.isfinite(method.weight).all()
    assert checkpoints(tmp_path) == ["step-00000004"]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def _bad_reward(ctx, loss):
    if ctx.step == 6:
        raise UserError("the reward x is nan")
    return loss


def test_an_error_of_the_method_tells_what_is_kept(tmp_path):
    words = r"^the reward x is nan; stopped at step 7, the last good checkpoint is .*step-00000004$"
    with pytest.raises(UserError, match=words):
        run(tmp_path, method=LinearMap(hook=_bad_reward))
    assert checkpoints(tmp_path) == ["step-00000004"]


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, g):
        return g * float("nan")


def test_a_bad_gradient_under_a_good_loss(tmp_path):
    method = LinearMap(hook=lambda ctx, loss: _BadGradient.apply(loss) if ctx.step == 2 else loss)
    with pytest.raises(UserError, match="the gradient is not finite at step 3.*there is no checkpoint yet"):
        run(tmp_path, method=method)
    assert torch.isfinite(method.weight).all()


def test_fp16_skips_an_overflow_and_goes_on(tmp_path):
    method = LinearMap(hook=lambda ctx, loss: _BadGradient.apply(loss) if ctx.step == 2 else loss)
    run(tmp_path, method=method, changes={"precision": "fp16"})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    scales = [r["loss_scale"] for r in rows]
    assert scales[2] == scales[1] / 2 and scales[-1] > 64
    assert "grad_norm" not in rows[2] and "grad_norm" in rows[-1] and torch.isfinite(method.weight).all()


def test_fp16_gives_up_when_no_scale_helps(tmp_path):
    method = LinearMap(hook=lambda _, loss: _BadGradient.apply(loss))
    with pytest.raises(UserError, match="fp16 gradient is not finite"):
        run(tmp_path, method=method, changes={"precision": "fp16", "steps": 60, "save_every": 60})


# ------------------------------------------------------------------ folders and settings


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--overwrite"):
        run(tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        run(tmp_path, resume=True, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run(tmp_path, changes={"steps": 8})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter").mkdir()
    run(tmp_path, changes={"steps": 3}, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "adapter").exists()
    assert checkpoints(tmp_path) == ["step-00000003"] and len(trace(tmp_path)) == 3


def test_overwrite_keeps_the_old_run_when_the_new_one_is_impossible(tmp_path):
    run(tmp_path)
    before = trace(tmp_path)
    with pytest.raises(UserError, match="fewer than one batch"):
        run(tmp_path, dataset=Points(3), overwrite=True)
    assert trace(tmp_path) == before


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="fewer than one batch of 4"):
        run(tmp_path / "few", dataset=Points(3))
    assert not (tmp_path / "few").exists()


def test_no_write_permission(tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write to .*Permission denied.*--out"):
        run(tmp_path / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission_for_real(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        run(tmp_path / "run")


def test_checking_a_folder_leaves_no_trace(tmp_path):
    run_folder.check(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "dataset", "words"),
    [
        ({**CONFIG, "train": {"lr": 0.1, "steps": 12}}, None, "train.lr: 0.05 -> 0.1"),
        (CONFIG, Points(24), "data \\(fingerprint of its content\\): .points-20. -> .points-24."),
    ],
)
def test_a_resumed_run_keeps_settings_and_data(tmp_path, config, dataset, words):
    run(tmp_path, method=LinearMap(hook=stop_at(5)))
    before = trace(tmp_path)
    with pytest.raises(UserError, match=words):
        run(tmp_path, config=config, dataset=dataset, resume=True)
    assert trace(tmp_path) == before


def test_steps_and_device_may_change(tmp_path):
    run(tmp_path)
    config = {**CONFIG, "train": {"lr": 0.05, "steps": 14}, "model": {"device": "auto"}, "eval": {"seed": 1}}
    _, result = run(tmp_path, config=config, changes={"steps": 14}, resume=True)
    assert result.step == 14 and json.loads((tmp_path / "run.json").read_text())["config"] == config


def test_run_files_that_cannot_be_read(tmp_path):
    run(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(UserError, match="format 9.*update t2ialign"):
        run(tmp_path, resume=True)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read.*--overwrite"):
        run(tmp_path, resume=True)


def test_a_broken_example_ends_the_run_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"image 11\.jpg is broken"):
        run(tmp_path, dataset=Points(broken=11))


def test_a_tracker_beside_deepspeed_of_accelerate_launch(tmp_path, monkeypatch):
    """Its plugin would want the package, and have transformers load the model of the evaluation in parts."""
    steps: list[int] = []

    class Told(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        def log(self, values, step=None, **options):
            steps.append(step)

    for name in ("USE_DEEPSPEED", "USE_FSDP"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    monkeypatch.setattr(loop, "tracker_available", lambda _name: None)  # none is installed
    monkeypatch.setattr(loop, "Accelerator", lambda **_options: Accelerator(log_with=Told()))
    run(tmp_path / "run", changes={"steps": 2, "tracker": "tensorboard"})
    assert steps == [1, 2] and os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_a_missing_tracker_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_available_trackers", list)
    with pytest.raises(UserError, match=r"tracker wandb.*t2ialign\[tracking\]"):
        run(tmp_path / "run", changes={"tracker": "wandb"})
    assert not (tmp_path / "run").exists()


def test_methods_that_break_the_contract(tmp_path):
    method = LinearMap()
    method.weight = torch.nn.Parameter(method.weight.detach().half())
    with pytest.raises(ValueError, match="must be float32"):
        run(tmp_path / "a", method=method)
    with pytest.raises(ValueError, match="shape"):
        run(tmp_path / "b", method=LinearMap(hook=lambda _, loss: loss[None]))
    empty = LinearMap()
    empty.trainables = dict
    with pytest.raises(UserError, match="nothing to train"):
        run(tmp_path / "c", method=empty)


# ------------------------------------------------------------------ words


def test_plain_lines_where_output_is_no_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    run(tmp_path, console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("linear: 36 trained numbers, 20 examples, batch 4, 12 steps, fp32 on cpu")
    assert lines[1].startswith("step 1/12  loss ") and lines[-1].startswith("step 12/12  loss ")
    assert "eta" not in lines[1]  # one step tells nothing: start-up is in it
    assert "eta 0:00" in lines[-1] and not any("\x1b" in line for line in lines)


def test_a_live_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    run(tmp_path, console=console)
    shown = console.file.getvalue()
    assert "12/12" in shown and "loss" in shown and "steps/s" in shown


def test_speed_and_eta_are_those_of_recent_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=80)
    display = log.Display(console, total=200, start=10)
    for done, seconds in (
        (11, 100.0),
        *((n, 10.0) for n in range(12, 31)),
        *((n, 2.0) for n in range(31, 61)),
    ):
        clock[0] += seconds
        display.step(done, 0.5)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["step 11/200  loss 0.5", "step 12/200  loss 0.5  10 s/step  eta 31:20"]
    assert lines[-1] == "step 60/200  loss 0.5  2 s/step  eta 4:40"


def test_time_texts():
    assert [duration_text(s) for s in (0.2, 65, 3725)] == ["0:00", "1:05", "1:02:05"]
    assert [rate_text(s) for s in (0.0, 0.25, 12.345)] == ["", "4 s/step", "12.3 steps/s"]


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(tmp_path):
    import gc

    counts = []

    def hook(ctx, loss):
        if ctx.step in (10, 90):
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        return loss

    run(tmp_path, method=LinearMap(hook=hook), changes={"steps": 100, "save_every": 100})
    assert counts[0] == counts[1]
