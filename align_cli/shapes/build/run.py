"""What every build stage shares: a clock with a schedule, and a state file that survives being killed."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from torch import nn


class Clock:
    """Wall clock of a stage, counted over resumes. The learning rate follows it, so a stage always ends
    annealed.
    """

    def __init__(self, minutes: float, used: float) -> None:
        self.limit, self.used, self.start = 60 * minutes, used, time.monotonic()

    def seconds(self) -> float:
        return self.used + time.monotonic() - self.start

    def over(self) -> bool:
        return self.seconds() >= self.limit

    def cosine(self, peak: float, step: int, *, warmup: int, seconds: float | None = None) -> float:
        """Cosine from `peak` to 3 % of it over the time limit, after a linear warm-up in steps."""
        done = min(1.0, (self.seconds() if seconds is None else seconds) / self.limit)
        return peak * min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


class Resumable:
    """Model, optimiser, step and seconds of one stage in one atomically replaced file."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: dict) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer
        self.step, self.seconds, self.extra = 0, 0.0, extra
        if path.exists():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            for name, values in self.extra.items():
                values.update(saved[name])
            self.step, self.seconds = saved["step"], saved["seconds"]
            print(f"resumed {path} at step {self.step}, {self.seconds:.0f} s", flush=True)

    def save(self, seconds: float) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | self.extra | {"step": self.step, "seconds": seconds}, temporary)
        os.replace(temporary, self.path)

    def finish(self, card: Path, seconds: float, measured: dict[str, float]) -> None:
        """Save the state and the measurements of the finished stage."""
        self.save(seconds)
        facts = {"seconds": round(seconds), "steps": self.step, "torch": torch.__version__}
        facts |= {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
        card.write_text(json.dumps(facts | {"measured": measured}, indent=2))


def line(metrics: dict[str, float]) -> str:
    """Measurements in one line of a log."""
    return " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
