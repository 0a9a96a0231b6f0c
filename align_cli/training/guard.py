"""The guard of a run: what is measured while it trains, and the trained tensors of the best measurement.

best/step-00000150/    these tensors, in the form of a checkpoint; the steps before it at which they were the
                       best so far, as long as there is a checkpoint from which a run would go on with them

How pictures become numbers is no matter of this room: see `evaluation.watch`. The measurements themselves are
lines of metrics.jsonl, which is also where a run that goes on learns what was best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align_cli.errors import UserError
from align_cli.files import file_errors
from align_cli.training import run_folder
from align_cli.training.checkpoint import DamagedError, keep_only, path_of, read_step, steps_in, write_step
from align_cli.training.distributed import Ranks
from align_cli.training.log import MetricsFile, duration_text


@dataclass(frozen=True)
class Watched:
    """One measurement. values: metric -> number; of "x", the change from the base and its interval are
    "x/change", "x/low" and "x/high". line: the same in words. alarm: what is wrong and what to do, "" for
    nothing.
    """

    values: Mapping[str, float]
    line: str
    alarm: str = ""


@dataclass(frozen=True)
class Guard:
    """What a run is guarded by.

    watch: measures the model as it is after that many steps; first of all it is called with 0, for the base
    model. Leaves the method's tensors and torch's random state alone. Called by rank 0.
    every, keep: see `settings.GuardSettings`. decides: the metric whose highest value is the best, held out
    from training; "" without one.
    """

    watch: Callable[[int], Watched]
    every: int
    keep: str = "last"
    decides: str = ""


@dataclass(frozen=True)
class Best:
    """The best measurement. change: from the base model's score, in the interval low .. high, which one
    prompt alone does not have.
    """

    step: int
    score: float
    change: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Guarded:
    """How a guarded run ended.

    step: whose tensors the method holds. best: by the metric `decides`, None without one. alarms: steps with
    an alarm. seconds: of all measurements, beside the training time.
    """

    step: int
    keep: str
    decides: str
    best: Best | None
    alarms: list[int]
    seconds: float


class Keeper:
    """A guard at work in the training loop. Every rank calls the same methods; rank 0 measures and writes.

    Args:
        groups: the trained parameters. averaged: the context in which they are what the run would give.
        say: prints a line. track: (numbers, step) for a tracker.
    """

    def __init__(
        self,
        guard: Guard,
        out: Path,
        groups: Mapping[str, Sequence[nn.Parameter]],
        metrics: MetricsFile,
        ranks: Ranks,
        *,
        averaged: Callable[[], AbstractContextManager[None]],
        say: Callable[[str], None],
        track: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self.guard, self.out, self.groups, self.metrics, self.ranks = guard, out, groups, metrics, ranks
        self.averaged, self.say, self.track = averaged, say, track
        self.folder = out / run_folder.BEST
        self.rows: dict[int, dict[str, Any]] = {}
        self.base: tuple[Watched, float] | None = None

    # ------------------------------------------------------------ the course of a run

    def look_at_base(self, start: int, steps: int) -> None:
        """Measure the base model, if a run from `start` to `steps` will be compared with it. Before anything
        is written: what cannot be measured is told here.
        """

        def work() -> None:
            if start >= steps and self._finished(start):
                return
            self.say("guard: measuring the base model ...")
            began = time.perf_counter()
            self.base = self.guard.watch(0), time.perf_counter() - began

        self.ranks.on_main(work)

    def _finished(self, step: int) -> bool:
        """Does metrics.jsonl hold the measurement of the last step already?"""
        return step % self.guard.every == 0 and step in self._measured(step)

    def _measured(self, step: int) -> dict[int, dict[str, Any]]:
        """Step -> its measurement, up to `step`."""
        return {row["step"]: row for row in self.metrics.rows(step) if "guard_seconds" in row}

    def begin(self, start: int, seconds: float) -> None:
        """Go on from what lies in the folder; make up the measurement of `start` that a stop prevented."""

        def work() -> None:
            self.rows = self._measured(start)
            with file_errors(f"cannot write to {self.folder}"):
                keep_only(self.folder, self.rows)
            self._miss()
            if self.base is not None:
                self.say(self.base[0].line)
                if 0 not in self.rows:
                    self._write(0, *self.base, seconds=0.0, at_end=False)
            if self._due(start):
                self._measure(start, seconds, False)

        self.ranks.on_main(work)

    def _miss(self) -> None:
        """Say so if the best tensors were there and are not."""
        steps = [step for step in sorted(self.rows) if step > 0] if self.guard.decides else []
        best = max(steps, key=self._score, default=None)
        if best != self._best():
            self.say(f"warning: the tensors of step {best}, the best until now, are gone from {self.folder}")

    def _due(self, step: int) -> bool:
        return step > 0 and step % self.guard.every == 0 and step not in self.rows

    def after(self, step: int, seconds: float) -> None:
        """`step` steps are finished, after `seconds` of training."""
        if step % self.guard.every == 0:
            self.ranks.on_main(partial(self._measure, step, seconds, False))

    def finish(self, step: int, seconds: float) -> Guarded:
        """Measure the last step, if that was not done. With keep best, the parameters are the best ones
        afterwards, on every rank.

        Raises:
            UserError: the best tensors cannot be read.
        """
        if step % self.guard.every:  # not written down for good: a longer run would not have measured here
            self.ranks.on_main(partial(self._measure, step, seconds, True))
        best = self.ranks.objects(self._best())[0]
        kept = step if best is None or self.guard.keep != "best" else best
        if kept != step:
            self.ranks.on_main(partial(self._load, kept))
            self.ranks.spread([p for group in self.groups.values() for p in group])
        return Guarded(
            step=kept,
            keep=self.guard.keep,
            decides=self.guard.decides,
            best=self._facts(best),
            alarms=[step for step, row in self.rows.items() if "guard/alarm" in row],
            seconds=round(sum(row["guard_seconds"] for row in self.rows.values()), 2),
        )

    def _facts(self, best: int | None) -> Best | None:
        if best not in self.rows:  # there is none, or this is not rank 0
            return None
        row, key = self.rows[best], f"guard/{self.guard.decides}"
        return Best(best, row[key], row[f"{key}/change"], row[f"{key}/low"], row[f"{key}/high"])

    # ------------------------------------------------------------ on rank 0

    def _measure(self, step: int, seconds: float, at_end: bool) -> None:
        began = time.perf_counter()
        with self.averaged():
            found = self.guard.watch(step)
            if self._is_best(found) and not at_end:
                self._store(step)
        spent = time.perf_counter() - began
        self.say(f"{found.line}; {duration_text(spent)} beside training")
        if found.alarm:
            self.say(found.alarm)
        self._write(step, found, spent, seconds=seconds, at_end=at_end)
        self._tidy()

    def _is_best(self, found: Watched) -> bool:
        best = self._best()
        return bool(self.guard.decides) and (
            best is None or found.values[self.guard.decides] > self._score(best)
        )

    def _score(self, step: int) -> float:
        return float(self.rows[step][f"guard/{self.guard.decides}"])

    def _best(self) -> int | None:
        """The best of the measured steps whose tensors are there, the first of equals."""
        if not self.guard.decides:
            return None
        there = {*steps_in(self.folder), *(step for step, row in self.rows.items() if row.get("partial"))}
        return max((step for step in sorted(self.rows) if step in there), key=self._score, default=None)

    def _write(self, step: int, found: Watched, spent: float, *, seconds: float, at_end: bool) -> None:
        row: dict[str, Any] = {"step": step} | {f"guard/{key}": value for key, value in found.values.items()}
        if found.alarm:
            row["guard/alarm"] = found.alarm
        row |= {"seconds": round(seconds, 3), "guard_seconds": round(spent, 3)}
        row |= {"partial": True} if at_end else {}
        self.metrics.append(row)
        self.rows[step] = row
        self.track(
            {key: x for key, x in row.items() if key.startswith("guard/") and key != "guard/alarm"}, step
        )

    def _store(self, step: int) -> None:
        state = {"trainables": {name: [p.detach().cpu() for p in g] for name, g in self.groups.items()}}
        where = path_of(self.folder, step)
        with file_errors(f"cannot write the best tensors to {where}", "make room, then go on with --resume"):
            write_step(self.folder, step, state)

    def _tidy(self) -> None:
        """Keep the newest, and for every checkpoint the one that was the best when it was written."""
        steps = steps_in(self.folder)
        ends = [*steps_in(self.out / run_folder.CHECKPOINTS), *steps[-1:]]
        keep_only(
            self.folder, {max(s for s in steps if s <= end) for end in ends if steps and steps[0] <= end}
        )

    def _load(self, step: int) -> None:
        path = path_of(self.folder, step)
        try:
            saved = read_step(path).state["trainables"]
        except DamagedError as error:
            raise UserError(
                f"the best tensors in {path} are damaged ({error}); take the last ones: --resume --keep last"
            ) from error
        with torch.no_grad():
            for name, group in self.groups.items():
                for p, value in zip(group, saved[name], strict=True):
                    p.copy_(value)
