"""What every build stage shares: one training loop over a fixed number of steps, and a state file that
survives being killed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def cosine(peak: float, step: int, steps: int, warmup: int) -> float:
    """Learning rate at `step`: linear warm-up, then a cosine from `peak` to 3 % of it at the last step."""
    return peak * min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Stage:
    """Model, optimiser, step and seconds of one stage in one atomically replaced file.

    `extra` are further dicts of tensors that the file keeps; loading writes into these tensors.
    """

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: dict) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer
        self.step, self.seconds, self.extra = 0, 0.0, extra
        if path.exists():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            for name, values in self.extra.items():
                for key, value in saved[name].items():
                    values[key].copy_(value)  # in place: the file goes on holding what the caller changes
            self.step, self.seconds = saved["step"], saved["seconds"]
            print(f"resumed {path} at step {self.step}, {self.seconds:.0f} s", flush=True)

    def fit(
        self,
        loss_at: Callable[[int], Tensor],
        *,
        steps: int,
        lr: float,
        warmup: int,
        every: int,
        report: Callable[[], str],
        main: bool = True,
        average_gradients: Callable[[], None] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Train up to `steps`. Everything random comes from the step number, so a stage that was killed and
        run again ends with the same weights.

        Parameters
        ----------
        loss_at
            The scalar loss of a step.
        every
            Steps between state files and log lines; the main process writes them.
        report
            Measurements for the log line.
        average_gradients, after_step
            Called after the backward pass and after the optimiser's step (with the count of finished steps).
        """
        start, shown, total = time.monotonic(), self.step, 0.0
        while self.step < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = cosine(lr, self.step, steps, warmup)
            value = loss_at(self.step)
            value.backward()
            if average_gradients is not None:
                average_gradients()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            total += value.item()
            if after_step is not None:
                after_step(self.step)
            if self.step % every == 0 or self.step == steps:
                spent, done = time.monotonic() - start, self.step - shown
                self.seconds += spent
                if main:
                    self.save()
                    head = f"{self.path.stem} step {self.step} loss {total / done:.4f}"
                    print(f"{head} {spent / done:.3f} s/step {report()}", flush=True)
                start, shown, total = time.monotonic(), self.step, 0.0

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | self.extra | {"step": self.step, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.path)

    def finish(self, card: Path, seed: int, measured: Mapping[str, float]) -> None:
        """Write the facts of the finished stage."""
        facts: dict[str, object] = {"steps": self.step, "seed": seed, "seconds": round(self.seconds)}
        facts |= {
            "torch": str(torch.__version__),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        }
        card.write_text(json.dumps(facts | {"measured": dict(measured)}, indent=2))


def line(metrics: dict[str, float]) -> str:
    """Measurements in one line of a log."""
    return " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
