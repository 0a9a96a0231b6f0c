"""What a run says: averages over steps, metrics.jsonl, and the live display."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from align_cli.files import file_errors, write_text

PLAIN_SECONDS = 5.0
"""Least seconds between plain progress lines."""
RECENT_STEPS = 20
"""Steps from which speed and ETA come."""


class Meter:
    """Means of named numbers. `state` goes into checkpoints: a window survives a stop in its middle."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.sums: dict[str, float] = dict((state or {}).get("sums", {}))
        self.counts: dict[str, int] = dict((state or {}).get("counts", {}))

    def add(self, values: Mapping[str, float]) -> None:
        """Count in one value per name."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
            self.counts[key] = self.counts.get(key, 0) + 1

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def means(self) -> dict[str, float]:
        return {key: self.sums[key] / self.counts[key] for key in self.sums}

    @staticmethod
    def merged(states: list[dict[str, Any]]) -> Meter:
        """One meter of what several counted, in order."""
        total = Meter()
        for state in states:
            for key, value in state["sums"].items():
                total.sums[key] = total.sums.get(key, 0.0) + value
                total.counts[key] = total.counts.get(key, 0) + state["counts"][key]
        return total


class MetricsFile:
    """metrics.jsonl: one object per line, flushed at once. `step` counts finished optimiser steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop what lies after checkpoint `step`: later lines, an unfinished window, half a line."""
        if not self.path.exists():
            return
        kept = [line + "\n" for line, _ in self._whole(step)]
        with file_errors(f"cannot write {self.path}"):
            write_text(self.path, "".join(kept))

    def rows(self, step: int) -> list[dict[str, Any]]:
        """What `cut(step)` leaves, or would leave."""
        return [row for _, row in self._whole(step)] if self.path.exists() else []

    def _whole(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        """(line, row) of every whole line up to `step` that is of no unfinished window."""
        with file_errors(f"cannot read {self.path}"):
            text = self.path.read_text(encoding="utf-8", errors="replace")
        found = []
        for line in text.splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step and not row.get("partial"):
                    found.append((line, row))
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        advice = "make room, then go on with --resume"
        with file_errors(f"cannot write {self.path}", advice), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_loss(key: str) -> bool:
    """Whether a reported number is a loss, which must be finite: "loss" or "<group>/loss"."""
    return key.rpartition("/")[2] == "loss"


def shown_loss(values: Mapping[str, float]) -> float:
    """The loss for the display: the first that the method reports, else the first number."""
    return next((v for k, v in values.items() if is_loss(k)), next(iter(values.values()), math.nan))


def rate_text(speed: float) -> str:
    """ "3.2 steps/s" or "4.1 s/step"; "" if nothing is known yet."""
    if speed <= 0:
        return ""
    return f"{speed:.3g} steps/s" if speed >= 1 else f"{1 / speed:.3g} s/step"


def duration_text(seconds: float) -> str:
    """3725 -> "1:02:05"; 65 -> "1:05"."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Display:
    """Live progress: a rich bar on a terminal, now and then a plain line elsewhere."""

    def __init__(self, console: Console | None, *, total: int, start: int) -> None:
        self.console, self.total, self.start = console, total, start
        self.spoke = time.monotonic()
        self.ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)  # of steps; the first has start-up in it
        self.bar: Progress | None = None
        if console is not None and console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[words]}"),
                console=console,
            )  # fmt: skip
            self.task = self.bar.add_task("training", total=total, completed=start, words="")

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """One line of text; above the bar if there is one."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, done: int, loss: float) -> None:
        """`done` steps are finished, the last one with this loss."""
        if self.console is None:
            return
        now = time.monotonic()
        self.ends.append(now)
        words = f"loss {loss:.4g}{self._pace(self.total - done)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, words=words)
        elif done in (self.start + 1, self.total) or now - self.spoke >= PLAIN_SECONDS:
            self.spoke = now
            self.say(f"step {done}/{self.total}  {words}")

    def pause(self, seconds: float) -> None:
        """So long something else than steps was done, just now."""
        self.ends = deque((end + seconds for end in self.ends), maxlen=self.ends.maxlen)

    def _pace(self, left: int) -> str:
        """Speed of the recent steps, and how long the steps that are left take at it."""
        if len(self.ends) < 2:
            return ""
        speed = (len(self.ends) - 1) / max(1e-9, self.ends[-1] - self.ends[0])
        return f"  {rate_text(speed)}  eta {duration_text(left / speed)}"
