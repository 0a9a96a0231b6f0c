"""The guard while training: what it measures, when it cries, which step it keeps; stop and resume."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from training_helpers import LinearMap, Points, scripted, settings, trace

from align_cli.errors import UserError
from align_cli.evaluation import watch as watching
from align_cli.evaluation.watch import HELD_OUT, TRAINED, Judge, Watch
from align_cli.rewards.base import Reward, rgb
from align_cli.settings import SampleSettings
from align_cli.training import checkpoint, log, run_folder
from align_cli.training.guard import Guard, Watched
from align_cli.training.log import read_metrics
from align_cli.training.loop import train

CONFIG = {"method": "linear", "train": {"lr": 0.05, "steps": 12}, "guard": {"every": 3, "keep": "last"}}


# ------------------------------------------------------------------ what is measured, and the alarm


class Brightness(Reward):
    """Mean of the picture, or of what it lacks to white."""

    def __init__(self, name: str, *, dark: bool = False) -> None:
        super().__init__(name=name, version="1", source="", preprocessing="none", scale="[0, 1]")
        self.dark = dark

    def score(self, images, prompts):
        mean = rgb(images, prompts).mean((1, 2, 3))
        return 1 - mean if self.dark else mean


class Look(Brightness):
    """The same with an image tower: the mean of every channel."""

    def image_vectors(self, images):
        return images.mean((2, 3)) + 0.01


class Painter:
    """In place of `sample`: 32 random pictures, changed by `change(pictures, rng)` while attached."""

    def __init__(self, change, monkeypatch, n: int = 32) -> None:
        self.change, self.n, self.attached, self.seeds = change, n, False, []
        self.rng = np.random.default_rng(1)
        monkeypatch.setattr(watching, "sample", self.sample)

    @contextmanager
    def attach(self, model, scale):
        self.attached = True
        yield
        self.attached = False

    def sample(self, model, prompts, settings, seeds):
        self.seeds.append(list(seeds))
        pictures = np.random.default_rng(0).uniform(0.3, 0.6, (self.n, 3, 4, 4))
        if self.attached:
            pictures = self.change(pictures, self.rng)
        return torch.from_numpy(pictures).float()

    def watch(self, *judges: Judge) -> Watch:
        names = [f"prompt {i}" for i in range(self.n)]
        return Watch(None, self, names, names, SampleSettings(), 7, lambda: judges, "do something")


def judges(reward: str = "trained", apart: str = "apart") -> tuple[Judge, Judge]:
    return (
        Judge(apart, Look(apart, dark=True), HELD_OUT),
        Judge(f"reward/{reward}", Brightness(reward), TRAINED),
    )


def test_an_alarm_where_the_reward_rises_and_the_held_out_scorer_falls(monkeypatch):
    """Worked by hand: every picture becomes brighter by 0.02 on average, which `apart` counts as darker."""
    painter = Painter(lambda x, rng: x + rng.normal(0.02, 0.01, (32, 1, 1, 1)), monkeypatch)
    watch = painter.watch(*judges())
    base = watch(0)
    assert set(base.values) == {"apart", "reward/trained", "saturation", "clipped"} and base.alarm == ""
    found = watch(300)
    assert painter.seeds[0] == painter.seeds[1]  # the same noise
    change = found.values["reward/trained/change"]
    assert 0.015 < change < 0.025 and found.values["apart/change"] == pytest.approx(-change, abs=1e-6)
    assert found.values["apart"] == pytest.approx(base.values["apart"] - change, abs=1e-6)
    assert found.values["apart/high"] < 0 < found.values["reward/trained/low"]
    assert 0 < found.values["feature_distance"] < 0.01
    assert found.alarm.startswith("ALARM at step 300: reward hacking, training gains reward/trained 0.45")
    assert "while held-out scorer falls: apart 0.5" in found.alarm and found.alarm.endswith("; do something")
    assert "(held out)" in found.line and "(trained on)" in found.line and "\n" not in found.line


def test_a_held_out_fall_alone_and_pictures_that_move_are_alarms_of_their_own(monkeypatch):
    apart, own = judges()
    watch = Painter(lambda x, rng: x + rng.normal(0.02, 0.01, (32, 1, 1, 1)), monkeypatch).watch(apart)
    assert "ALARM at step 5: held-out scorer falls: apart" in watch(5).alarm
    lowered = Judge("reward/trained", own.reward, TRAINED, -1.0)  # training lowers it: its rise is no gain
    watch = Painter(lambda x, rng: x + rng.normal(0.02, 0.01, (32, 1, 1, 1)), monkeypatch).watch(
        apart, lowered
    )
    assert "reward hacking" not in watch(5).alarm and "held-out scorer falls" in watch(5).alarm

    def stretched(x, rng):
        mean = x.mean(1, keepdims=True)
        return np.clip(mean + (x - mean) * rng.normal(1.4, 0.1, (32, 1, 1, 1)), 0, 1)

    text = Painter(stretched, monkeypatch).watch(*judges())(5).alarm
    assert text.startswith("ALARM at step 5: the pictures have moved: saturation 0.1")
    few = Painter(lambda x, rng: np.where(rng.random(x.shape) < 0.008, 1.0, x), monkeypatch)
    assert few.watch()(5).alarm == "" and few.watch()(5).values["clipped/low"] > 0
    burnt = Painter(lambda x, rng: np.where(rng.random(x.shape) < 0.1, 1.0, x), monkeypatch)
    assert "clipped 0.000 -> 0.09" in burnt.watch()(5).alarm


def test_no_alarm_on_noise(monkeypatch):
    """A reward that climbs at every look, and a held-out scorer that chance alone moves."""

    def change(x, rng):
        return np.clip(x + rng.normal(0, 0.05, (32, 1, 1, 1)), 0, 1)

    class Random(Reward):
        rng = torch.Generator().manual_seed(0)

        def score(self, images, prompts):
            return torch.rand(len(images), generator=self.rng)

    class Climbing(Random):
        level = 0.0

        def score(self, images, prompts):
            self.level += 0.5
            return self.level + torch.rand(len(images), generator=self.rng)

    facts = {"version": "1", "source": "", "preprocessing": "", "scale": ""}
    apart = [Judge(f"apart{i}", Random(name="apart", **facts), HELD_OUT) for i in range(3)]
    reward = Judge("reward", Climbing(name="reward", **facts), TRAINED)
    painter = Painter(change, monkeypatch)
    found = [painter.watch(*apart, reward)(9) for _ in range(200)]
    assert all(w.values["reward/low"] > 0 for w in found)
    below = sum(w.values[f"apart{i}/high"] < 0 for w in found for i in range(3))
    cries = [w.alarm for w in found if w.alarm]
    assert below > 8 and len(cries) <= 3  # 15 are expected below by the intervals that are shown


def test_too_few_prompts_give_no_alarm(monkeypatch):
    painter = Painter(lambda x, rng: x + rng.normal(0.1, 0.01, (5, 1, 1, 1)), monkeypatch, n=5)
    found = painter.watch(*judges())(5)
    assert found.values["apart/high"] < 0 and found.alarm == ""


def test_pictures_and_numbers_that_are_none_end_the_run_in_words(monkeypatch):
    painter = Painter(lambda x, _: x * np.nan, monkeypatch)
    watch = painter.watch(*judges())
    watch(0)
    with pytest.raises(UserError, match=r"guard: the model after step 9 draws pictures that are not finite"):
        watch(9)
    broken = Brightness("broken")
    broken.score = lambda images, _: images.mean((1, 2, 3)) * float("nan")
    with pytest.raises(
        UserError, match=r"guard: broken gives nan .*the base model.*'prompt 0'.*guard.scorers"
    ):
        Painter(lambda x, _: x, monkeypatch).watch(Judge("broken", broken, HELD_OUT))(0)


# ------------------------------------------------------------------ in the loop


def by_weight(method: LinearMap, *, seen: dict | None = None, **options) -> Guard:
    """The score is read from the trained tensors: best somewhere in the middle."""

    def watch(step):
        if step and seen is not None:
            seen[step] = method.weight.detach().clone()
        x = float(torch.sin(33 * method.weight.detach()).sum()) if step else 0.0
        return Watched({"apart": x, "apart/change": x, "apart/low": x, "apart/high": x}, "")

    return Guard(watch, 3, decides="apart", **options)


def run(out: Path, guard: Guard | None, *, method=None, changes=None, **options):
    method = method or LinearMap()
    chosen = settings(**(changes or {}))
    return method, train(method, Points(), chosen, out, config=CONFIG, guard=guard, **options)


def saved(out: Path, step: int) -> torch.Tensor:
    path = out / "checkpoints" / f"step-{step:08d}" / "state.pt"
    return torch.load(path, weights_only=True)["trainables"]["map"][0]


def kept(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "best").iterdir())


def plain(out: Path) -> list[str]:
    """The lines of the training itself."""
    return [line for line in trace(out) if '"guard/' not in line]


def looks(out: Path) -> list[str]:
    return [line for line in trace(out) if '"guard/' in line]


def test_a_guard_changes_nothing_of_the_training(tmp_path):
    method, result = run(tmp_path / "plain", None)
    assert result.guarded is None and not (tmp_path / "plain" / "best").exists()
    torch.manual_seed(0)
    guarded, result = run(tmp_path / "guarded", scripted())
    assert plain(tmp_path / "guarded") == trace(tmp_path / "plain")
    assert torch.equal(method.weight, guarded.weight)


def test_every_measurement_is_a_line_and_the_alarm_is_one_more(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    _, result = run(tmp_path, scripted(), console=console)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "guard_seconds" in row]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    assert rows[0]["guard/apart"] == 0.5 and rows[2]["guard/apart/change"] == pytest.approx(0.2)
    assert [row["step"] for row in rows if "guard/alarm" in row] == [3] == result.guarded.alarms
    assert rows[2]["seconds"] < result.seconds + 1 and result.guarded.seconds >= 0
    lines = console.file.getvalue().splitlines()
    assert lines[:1] == ["guard: measuring the base model ..."] and "base" in lines
    assert lines[lines.index("ALARM 3") - 1] == "look 3; 0:00 beside training"
    assert sum(line.startswith("look ") for line in lines) == 4
    # the last step is held, the best is there all the same: the first of equals
    assert result.kept_step == 12 and result.guarded.best.step == 6
    assert kept(tmp_path)[-1] == "step-00000006"


def test_the_best_step_is_kept_for_the_end(tmp_path):
    last, _ = run(tmp_path / "last", scripted())
    seen = {}
    method = LinearMap()
    run(tmp_path / "see", by_weight(method, seen=seen), method=method)
    best, result = run(tmp_path / "best", scripted(keep="best"))
    assert result.kept_step == 6 and result.step == 12
    assert result.guarded.best.score == 0.7 and result.guarded.best.change == pytest.approx(0.2)
    assert torch.equal(best.weight, seen[6]) and not torch.equal(best.weight, last.weight)
    assert torch.equal(saved(tmp_path / "best", 12), saved(tmp_path / "last", 12))


def test_a_finished_run_can_be_asked_for_its_best_step(tmp_path):
    run(tmp_path / "run", scripted())
    before = trace(tmp_path / "run")
    seen: list[int] = []
    config = {**CONFIG, "guard": CONFIG["guard"] | {"keep": "best"}}
    method = LinearMap()
    result = train(
        method, Points(), settings(), tmp_path / "run", config=config, resume=True,
        guard=scripted(keep="best", seen=seen),
    )  # fmt: skip
    assert result.kept_step == 6 and seen == [] and trace(tmp_path / "run") == before
    best, _ = run(tmp_path / "best", scripted(keep="best"))
    assert torch.equal(method.weight, best.weight)


def test_the_last_step_is_measured_but_not_for_a_longer_run(tmp_path):
    method, result = run(tmp_path / "cut", scripted(keep="best"), changes={"steps": 11})
    assert result.kept_step == 11 and result.guarded.best.score == 0.9
    assert torch.equal(method.weight, saved(tmp_path / "cut", 11))
    assert (
        read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1] | {"partial": True, "step": 11}
        == (read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1])
    )
    again, result = run(tmp_path / "cut", scripted(keep="best"), changes={"steps": 11}, resume=True)
    assert result.kept_step == 11 and torch.equal(again.weight, method.weight)
    longer, _ = run(tmp_path / "cut", scripted(keep="best"), resume=True)
    whole, _ = run(tmp_path / "whole", scripted(keep="best"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert torch.equal(longer.weight, whole.weight)


def test_a_worse_model_than_the_base_is_said_to_be_worse(tmp_path):
    from types import SimpleNamespace

    from align_cli.cli.watching import guard_words

    resolved = SimpleNamespace(method="linear")
    scores = {3: 0.2, 6: 0.4, 9: 0.1, 12: 0.3}
    _, result = run(tmp_path / "a", scripted(scores, keep="best"))
    first, second = guard_words(result.guarded, resolved, tmp_path)
    assert first == "guard: 4 times alarm, at step 3, 6, 9, 12"
    assert second == (
        "guard: the adapter holds step 6, the best: held-out apart 0.400, -0.1000 [-0.2000, 0] against the "
        "base model: no step was better than the base model"
    )
    _, result = run(tmp_path / "b", scripted())
    line = guard_words(result.guarded, resolved, tmp_path)[1]
    assert "step 6 was better than the last" in line and "--resume" in line and line.endswith("--keep best")


def stop_at(step: int):
    def hook(ctx, loss):
        if ctx.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    return hook


@pytest.mark.parametrize("at", [1, 2, 6, 8, 11], ids=lambda at: f"in step {at + 1}")
@pytest.mark.parametrize(
    "changes", [{}, {"ema_decay": 0.9, "save_every": 5, "log_every": 5}], ids=["", "ema"]
)
def test_stop_and_resume_end_with_the_same_best_tensors(tmp_path, at, changes):
    """Also where the stop prevents the measurement of its step (3, 9, 12), which is then made up."""
    seen: dict[int, torch.Tensor] = {}
    whole, cut, again = LinearMap(), LinearMap(hook=stop_at(at)), LinearMap()
    _, first = run(
        tmp_path / "whole", by_weight(whole, seen=seen, keep="best"), method=whole, changes=changes
    )
    _, stopped = run(tmp_path / "cut", by_weight(cut, keep="best"), method=cut, changes=changes)
    assert stopped.step == at + 1 and stopped.signal == signal.SIGINT and stopped.guarded is None
    guard = by_weight(again, keep="best")
    _, result = run(tmp_path / "cut", guard, method=again, changes=changes, resume=True)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert result.guarded.best == first.guarded.best and result.kept_step == first.kept_step < 12
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.weight, seen[first.kept_step])
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")


def die_at(out: Path, where: str) -> None:
    """A run of which nothing is left but its files, in a process of its own."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, data):
        if where in self.file.name and self.size > 500:
            self.file.flush()
            die()
        return real_write(self, data)

    def append(self, row):
        if where == f"row {row['step']}" and "guard_seconds" in row:
            die()
        real_append(self, row)

    real_write, real_append = checkpoint._HashingFile.write, log.MetricsFile.append
    checkpoint._HashingFile.write, log.MetricsFile.append = write, append
    method = LinearMap()
    run(out, by_weight(method, keep="best"), method=method)


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("where", ["best/.step-00000006", "row 6", "checkpoints/.step-00000008"])
def test_kill_9_and_resume_end_with_the_same_best_tensors(tmp_path, where):
    """In the middle of writing the best tensors, before their line, and at a checkpoint after them."""
    whole = LinearMap()
    _, first = run(tmp_path / "whole", by_weight(whole, keep="best"), method=whole)
    assert first.kept_step == 6
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(tmp_path / "cut", where))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = LinearMap()
    _, result = run(tmp_path / "cut", by_weight(again, keep="best"), method=again, resume=True)
    assert result.resumed_from == 4 and result.kept_step == 6
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert torch.equal(again.weight, whole.weight) and kept(tmp_path / "cut") == kept(tmp_path / "whole")


def test_a_checkpoint_before_the_best_step_keeps_its_own_best(tmp_path):
    """The newest checkpoint is damaged: the run goes on from the one before, and with the best of then."""
    scores = {3: 0.6, 6: 0.7, 9: 0.8, 12: 0.2}
    run(tmp_path / "run", scripted(scores, keep="best"))
    assert kept(tmp_path / "run") == ["step-00000006", "step-00000009"]  # of checkpoints 8 and 12
    (tmp_path / "run" / "checkpoints" / "step-00000012" / "state.pt").write_bytes(b"half")
    other = scores | {9: 0.1}  # as it may come out on a GPU
    _, result = run(tmp_path / "run", scripted(other, keep="best"), resume=True)
    assert result.resumed_from == 8 and result.kept_step == 6 and result.guarded.best.score == 0.7


def test_tensors_that_are_gone_or_damaged_are_told(tmp_path):
    run(tmp_path / "run", scripted())
    path = tmp_path / "run" / "best" / "step-00000006" / "state.pt"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"step-00000006 are damaged .*--keep last"):
        run(tmp_path / "run", scripted(keep="best"), resume=True)
    checkpoint.keep_only(tmp_path / "run" / "best", [3])
    console = Console(file=io.StringIO(), width=80)
    _, result = run(tmp_path / "run", scripted(keep="best"), resume=True, console=console)
    assert "warning: the tensors of step 6, the best until now, are gone" in console.file.getvalue()
    assert result.kept_step == 12


def test_what_cannot_be_measured_is_told_before_anything_is_written(tmp_path):
    def watch(step):
        raise UserError("no weights of apart")

    with pytest.raises(UserError, match="no weights of apart"):
        run(tmp_path / "run", Guard(watch, 3))
    assert not (tmp_path / "run").exists()


def test_a_guard_without_a_held_out_scorer_keeps_nothing(tmp_path):
    _, result = run(tmp_path, scripted(decides=""))
    assert result.guarded.best is None and result.kept_step == 12 and not (tmp_path / "best").exists()
    assert [json.loads(line + "}")["step"] for line in looks(tmp_path)] == [0, 3, 6, 9, 12]


def test_a_run_of_a_version_without_guards_goes_on_with_one(tmp_path):
    old = {key: value for key, value in CONFIG.items() if key != "guard"}
    train(LinearMap(hook=stop_at(4)), Points(), settings(), tmp_path, config=old)
    _, result = run(tmp_path, scripted(keep="best"), resume=True)
    assert result.step == 12 and result.kept_step == 6
    with pytest.raises(UserError, match=r"guard.every: 3 -> 4"):
        run_folder.check_same(CONFIG, {**CONFIG, "guard": {"every": 4}}, "", "", tmp_path)


# ------------------------------------------------------------------ stopping at the end


def test_ctrl_c_in_the_very_last_step_stops(tmp_path):
    changes = {"ema_decay": 0.9, "log_every": 5}
    whole, _ = run(tmp_path / "whole", None, changes=changes)
    _, stopped = run(tmp_path / "cut", None, method=LinearMap(hook=stop_at(11)), changes=changes)
    assert stopped.step == 12 and stopped.signal == signal.SIGINT
    again, result = run(tmp_path / "cut", None, changes=changes, resume=True)
    assert result.signal == 0 and result.resumed_from == 12
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole") and torch.equal(again.weight, whole.weight)
