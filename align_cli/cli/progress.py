"""Progress on stderr: a bar on a terminal, a few plain lines where output is not one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from align_cli.training.log import duration_text

PLAIN_SECONDS = 20.0
"""Seconds between plain lines."""


class DrawingProgress:
    """Context manager; call it as (what, done, total). One bar or one series of lines per `what`."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last = time.monotonic()

    def __enter__(self) -> DrawingProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(f"drawing {what}", total=total)
            self.bar.update(self.tasks[what], completed=done)
        elif done == total or time.monotonic() - self.last > PLAIN_SECONDS:
            self.last = time.monotonic()
            self.console.print(f"drawing {what}: {100 * done // total} %", highlight=False)


class CountingProgress:
    """Context manager over things that are counted: call it as (what, how many more are done).

    totals: how many there are of what; done: how many are done before it starts. Shows the rate and the time
    left.
    """

    def __init__(
        self,
        totals: Mapping[str, int],
        done: Mapping[str, int],
        console: Console | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.totals, self.done = dict(totals), {what: done.get(what, 0) for what in totals}
        self.before = dict(self.done)
        self.began: dict[str, float] = {}
        self.seen = self.spoke = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks = {
            what: self.bar.add_task(what, total=totals[what], completed=self.done[what], rate="", start=False)
            for what in totals
        }

    def __enter__(self) -> CountingProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def say(self, text: str) -> None:
        """One line; above the bars if there are any."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, what: str, more: int) -> None:
        now = time.monotonic()
        if what not in self.began:
            self.began[what] = self.seen  # the end of what was counted before
            self.bar.start_task(self.tasks[what])
        self.seen = now
        self.done[what] += more
        done, total = self.done[what], self.totals[what]
        speed = max(1e-9, done - self.before[what]) / max(1e-9, now - self.began[what])
        rate = f"{speed:.3g}/s" if speed >= 1 else f"{1 / speed:.3g} s each"
        if self.console.is_terminal:
            self.bar.update(self.tasks[what], completed=done, rate=rate)
        elif done == total or now - self.spoke > PLAIN_SECONDS:
            self.spoke = now
            left = "" if done == total else f"  eta {duration_text((total - done) / speed)}"
            self.say(f"{what} {done:,}/{total:,}  {rate}{left}")
