"""The only training loop: its course, files, logs, measurements. A step is in learner.py, a method owns its
maths.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.console import Console

from align_cli.data.base import Dataset
from align_cli.errors import UserError
from align_cli.files import clear_parts, file_errors, write_text
from align_cli.methods.base import Method
from align_cli.settings import TrainSettings
from align_cli.training import run_folder
from align_cli.training.checkpoint import Checkpoint, clean, load_newest, save_checkpoint
from align_cli.training.distributed import without_plugins
from align_cli.training.guard import Guard, Guarded, Keeper
from align_cli.training.learner import Learner
from align_cli.training.log import Display, Meter, MetricsFile, duration_text
from align_cli.training.order import SliceOrder, batches
from align_cli.training.schedule import lr_at
from align_cli.training.signals import StopSignals

Grid = Callable[[int, Path], None]
"""Draws a sample grid: (finished steps, path of the PNG). Must not touch the method's parameters."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. On a normal end the method holds the trained tensors (their average, with
    train.ema_decay): those after the last step or, with guard.keep best, those of the best measurement.

    step: finished optimiser steps. seconds: training time over all sittings. metrics: the last logged means.
    signal: what stopped it (2 is Ctrl-C), after the last step, too; else 0. guarded: what the guard found.
    """

    step: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    resumed_from: int = 0
    signal: int = 0
    guarded: Guarded | None = None

    @property
    def kept_step(self) -> int:
        """The step whose tensors the method holds."""
        return self.step if self.guarded is None else self.guarded.step


def train(
    method: Method,
    dataset: Dataset,
    settings: TrainSettings,
    out: Path,
    *,
    config: Mapping[str, Any],
    origin: Mapping[str, str] | None = None,
    config_text: Callable[[Mapping[str, str]], str] | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    overwrite: bool = False,
    num_workers: int = 0,
    grid: Grid | None = None,
    guard: Guard | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train `method` on `dataset`.

    Args:
        config, origin: the resolved configuration as plain dicts; kept in run.json and compared on resume.
        config_text: origins -> the same as TOML, kept in config.toml.
        resume: go on from the newest whole checkpoint in `out`; the trace is that of a run never stopped.
        allow_change: settings that may differ from those it was begun with, see run_folder.check_same.
        overwrite: remove the run that `out` holds.
        num_workers: loader processes. grid: drawn every train.grid_every steps. guard: measures while it
        trains. console: None is silent.
    Raises:
        UserError: see run_folder.check and order.SliceOrder; the loss or a gradient is not finite; the disk
            is full; what the dataset, the method or the guard says. The last good checkpoint is kept in every
            case.
    """
    return Run(
        method, dataset, settings, out, config, origin or {}, config_text, num_workers, grid, guard, console
    ).run(resume=resume, allow_change=allow_change, overwrite=overwrite)


class Run:
    """State of one call of `train`."""

    def __init__(
        self,
        method: Method,
        dataset: Dataset,
        settings: TrainSettings,
        out: Path,
        config: Mapping[str, Any],
        origin: Mapping[str, str],
        config_text: Callable[[Mapping[str, str]], str] | None,
        num_workers: int,
        grid: Grid | None,
        guard: Guard | None,
        console: Console | None,
    ) -> None:
        self.method, self.dataset, self.settings, self.out = method, dataset, settings, out
        self.config, self.origin, self.config_text = config, origin, config_text
        self.changes: list[run_folder.Change] = []
        self.num_workers, self.grid = num_workers, grid
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.learner = Learner(method, settings, self._last_good)
        self.ranks = self.learner.ranks
        self.console = console if self.ranks.main else None
        self.meter = Meter()
        self.metrics_file = MetricsFile(out / run_folder.METRICS)
        self.seconds = 0.0
        self.saved: Path | None = None
        self.saved_step = -1
        self.last: dict[str, float] = {}
        self.tracker: Accelerator | None = None
        self.keeper: Keeper | None = None
        if guard is not None:
            self.keeper = Keeper(
                guard, out, self.learner.groups, self.metrics_file, self.ranks,
                averaged=self.learner.averaged, say=self._say, track=self._track,
            )  # fmt: skip

    # ------------------------------------------------------------ the course of a run

    def run(self, *, resume: bool, allow_change: Sequence[str], overwrite: bool) -> TrainResult:
        s = self.settings
        tracker_available(s.tracker)
        self._order(0)  # too few examples or an impossible batch: before anything is written
        self.ranks.on_main(lambda: run_folder.check(self.out, resume=resume, overwrite=overwrite))
        start = self.ranks.agreed(self._load(allow_change) if resume else 0, "step to go on from")
        if self.keeper is not None:
            self.keeper.look_at_base(start, s.steps)
        self.ranks.on_main(lambda: self._prepare(start, overwrite))
        self._start_tracker()
        self._describe(start)
        with StopSignals() as signals, Display(self.console, total=s.steps, start=start) as self.display:
            if self.keeper is not None:
                self.keeper.begin(start, self.seconds)
            step = self._steps(start, signals)
            if self.saved_step != step and step > 0:
                self._save(step)
        signal = max(self.ranks.objects(signals.received))
        guarded = None if signal else self._finish(step)
        if self.tracker is not None:
            for tracker in self.tracker.trackers:  # end_training would leave the group on this rank alone
                tracker.finish()
        return TrainResult(
            step=step,
            seconds=self.seconds,
            metrics=self.last,
            checkpoint=self.saved,
            resumed_from=start,
            signal=signal,
            guarded=guarded,
        )

    def _order(self, start: int) -> SliceOrder:
        s = self.settings
        return SliceOrder(
            len(self.dataset),
            batch_size=s.batch_size,
            seed=s.seed,
            start=start * s.accumulation,
            stop=s.steps * s.accumulation,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def _steps(self, start: int, signals: StopSignals) -> int:
        """Train from step `start`; returns the number of finished steps."""
        s = self.settings
        stream = batches(
            self.dataset,
            self._order(start),
            num_workers=self.num_workers,
            pin=self.learner.device.type == "cuda",
        )
        self._make_up_grid(start)
        for step in range(start, s.steps):
            began = time.perf_counter()
            values, shown, stop = self.learner.step(step, stream, lambda: signals.received > 0)
            self.meter.add(values)
            self.seconds += time.perf_counter() - began
            done = step + 1
            if done % s.log_every == 0:
                self._log(done)
            self.display.step(done, shown)
            if done % s.save_every == 0 or done == s.steps or stop:
                self._save(done)
            if self.keeper is not None and not stop:
                began = time.perf_counter()
                self.keeper.after(done, self.seconds)
                self.display.pause(time.perf_counter() - began)
            if s.grid_every and done % s.grid_every == 0 and self.grid is not None:
                self.ranks.on_main(partial(self._draw, self.grid, done))
            if stop:
                return done
        return max(start, s.steps)

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    # ------------------------------------------------------------ files

    def _prepare(self, start: int, overwrite: bool) -> None:
        """Make the folder ready: an old run is removed only here, when all else is known to be fine."""
        advice = "choose another folder with --out"
        with file_errors(f"cannot write to {self.out}", advice):
            if overwrite:
                run_folder.clear(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            packages = ("torch", "diffusers", "transformers", "accelerate", "numpy")
            versions = {"python": platform.python_version()} | {
                name: package_version(name) for name in packages
            }
            fingerprint = self.dataset.fingerprint()
            origin = dict(self.origin) | run_folder.origins(self.changes)
            text = run_folder.run_text(self.config, origin, fingerprint, versions, self.changes)
            write_text(self.out / run_folder.RUN, text)
            write_text(self.out / run_folder.CONFIG, self.config_text(origin) if self.config_text else "")
            clear_parts(self.out)
            clean(self.out / run_folder.CHECKPOINTS, self.settings.keep_checkpoints, upto=start)
        self.metrics_file.cut(start)

    def _load(self, allowed: Sequence[str]) -> int:
        """Restore the newest whole checkpoint; returns the number of its finished steps."""
        saved = run_folder.read_run(self.out)
        changed = run_folder.check_same(
            saved["config"],
            self.config,
            str(saved.get("data_fingerprint")),
            self.dataset.fingerprint(),
            self.out,
            allowed,
        )
        found, damaged = load_newest(self.out / run_folder.CHECKPOINTS)
        for line in damaged:
            self._say(f"warning: {line}")
        start = 0 if found is None else found.step
        new = [run_folder.Change(start, *change) for change in changed]
        self.changes = run_folder.changes_in(saved, start) + new
        if found is None:
            self._say(f"{self.out} holds no whole checkpoint yet: starting at step 0")
        else:
            self._restore(found, [change.key for change in new])
        for change in new:
            self._say(f"{change.key} = {change.now!r}: {change.origin}")
        return start

    def _restore(self, found: Checkpoint, changed: Sequence[str]) -> None:
        """Take over the state of a checkpoint; but for `changed` it is of the same settings."""
        self.learner.load_state(found, changed)
        state = found.state
        # Sums of all ranks lie in rank 0's meter from here on; the others count on from nothing.
        self.meter = Meter(state["window"] if self.ranks.main else None)
        self.seconds, self.saved, self.saved_step = state["seconds"], found.path, found.step
        self.last = dict(state["last"])

    def _save(self, step: int) -> None:
        windows = self.ranks.objects(self.meter.state())
        state = self.learner.state() | {
            "window": Meter.merged(windows).state(),
            "last": self.last,
            "seconds": self.seconds,
        }
        folder = self.out / run_folder.CHECKPOINTS

        def write() -> None:
            self.saved = save_checkpoint(folder, step, state, keep=self.settings.keep_checkpoints)

        self.ranks.on_main(write)
        self.saved_step = step

    def _draw(self, grid: Grid, step: int) -> None:
        folder = self.out / run_folder.GRIDS
        with file_errors(f"cannot write to {folder}"):
            folder.mkdir(exist_ok=True)
        with self.learner.averaged():
            grid(step, folder / f"step-{step:08d}.png")

    def _make_up_grid(self, start: int) -> None:
        """Draw the grid that belongs to the checkpoint a run goes on from, if a kill prevented it."""

        def work(grid: Grid) -> None:
            if not (self.out / run_folder.GRIDS / f"step-{start:08d}.png").exists():
                self._draw(grid, start)

        every = self.settings.grid_every
        if self.grid is not None and every and start and start % every == 0:
            self.ranks.on_main(partial(work, self.grid))

    def _track(self, values: Mapping[str, float], step: int) -> None:
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def _log(self, done: int, *, partial: bool = False) -> None:
        """Write the means since the last line, over all ranks."""
        means = Meter.merged(self.ranks.objects(self.meter.state())).means()
        self.meter = Meter()
        self.last = means
        if self.ranks.main:
            row = {
                "step": done,
                "lr": lr_at(self.settings, done - 1),
                **means,
                "seconds": round(self.seconds, 3),
            }
            self.metrics_file.append(row | {"partial": True} if partial else row)
        self._track(means | {"lr": lr_at(self.settings, done - 1)}, done)

    def _finish(self, step: int) -> Guarded | None:
        """After the last checkpoint: log what the last full line lacks, leave in the method what it is to
        give: the average, or the best.
        """
        if any(self.ranks.objects(bool(self.meter.counts))):
            self._log(step, partial=True)
        if self.learner.ema is not None:
            self.learner.ema.copy_to_parameters()
        return None if self.keeper is None else self.keeper.finish(step, self.seconds)

    # ------------------------------------------------------------ words

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, start: int) -> None:
        s, count = self.settings, sum(p.numel() for p in self.learner.parameters)
        batch = f"batch {s.batch_size}" + (f" x {s.accumulation}" if s.accumulation > 1 else "")
        ranks = f", {self.ranks.world_size} processes" if self.ranks.world_size > 1 else ""
        threads = f", {torch.get_num_threads()} threads" if self.learner.device.type == "cpu" else ""
        self._say(
            f"{self.method.name}: {count:,} trained numbers, {len(self.dataset):,} examples, {batch}, "
            f"{s.steps} steps, "
            f"{s.precision} on {self.learner.device}{threads}{ranks}"
        )
        if s.precision == "fp16" and self.learner.device.type == "cpu":
            self._say("note: fp16 on a CPU is emulated and slow; --set train.precision=fp32 is faster here")
        if start:
            self._say(f"resumed at step {start} after {duration_text(self.seconds)}")

    def _start_tracker(self) -> None:
        if self.settings.tracker == "none" or not self.ranks.main:
            return
        folder = self.out / run_folder.TRACKER
        with file_errors(f"cannot write to {folder}"):
            folder.mkdir(exist_ok=True)
        with without_plugins():
            self.tracker = Accelerator(log_with=self.settings.tracker, project_dir=folder)
        values = {k: v for k, v in run_folder.flat(self.config).items() if isinstance(v, int | float | str)}
        self.tracker.init_trackers("t2ialign", config=values)


def tracker_available(name: str) -> None:
    """UserError if `train.tracker` names a package that is not installed."""
    if name != "none" and name not in [str(t.value) for t in get_available_trackers()]:
        raise UserError(
            f"train.tracker {name} needs a package that is not installed; pip install 't2ialign[tracking]', "
            f"or --set train.tracker=none"
        )


def package_version(name: str) -> str:
    """Installed version of a package, "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
