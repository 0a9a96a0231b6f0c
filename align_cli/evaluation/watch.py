"""A model measured while it trains: the same held-out prompts from the same noise, base against aligned.

Letters: N pictures, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from align_cli.errors import UserError
from align_cli.evaluation.drift import HasFeatures, colours, features
from align_cli.evaluation.guard import interval, number, relative_change, signed
from align_cli.evaluation.scoring import BATCH, as_tensor
from align_cli.evaluation.stats import GAIN, LOSS, Paired, holm, paired
from align_cli.methods.base import Method
from align_cli.models.base import BaseModel
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Reward
from align_cli.sampling import picture_seeds, sample
from align_cli.settings import SampleSettings
from align_cli.training.guard import Watched

LEVEL = 0.99
"""Coverage of the intervals that an alarm goes by. A run is looked at many times, and the intervals of 95 %
that are shown would miss the truth at one look in twenty."""
MOVED, LEAST = 0.25, 0.01
"""Change of saturation or of clipped values that is an alarm: relative, and absolute (both are in [0, 1])."""
HELD_OUT, TRAINED, DRIFT = "held out", "trained on", "drift"


@dataclass(frozen=True)
class Judge:
    """Who gives a number to every picture, the headline of `reward`. key: its name in metrics.jsonl and in
    words. kind: held out, or trained on. sign: -1 where training lowers the reward.
    """

    key: str
    reward: Reward
    kind: str
    sign: float = 1.0


@dataclass(frozen=True)
class Reading:
    """One quantity, base against now. verdict: gain or loss, where chance is ruled out at LEVEL."""

    key: str
    kind: str
    row: Paired
    verdict: str
    sign: float = 1.0

    def words(self) -> str:
        row = self.row
        change = f"{number(row.base)} -> {number(row.aligned)}, {signed(row.difference)} {interval(row)}"
        return f"{self.key} {change}"


class Watch:
    """Measures `method` at work on `model`; called as `training.guard.Guard.watch`.

    Args:
        prompts: N held-out prompts. clusters: N names; prompts of one name are no independent evidence.
        settings, seed: how they are drawn, and from which noise.
        judges: loads those that judge, at the first call.
        advice: what to do after an alarm, in words.
    """

    def __init__(
        self,
        model: BaseModel,
        method: Method,
        prompts: Sequence[str],
        clusters: Sequence[Hashable],
        settings: SampleSettings,
        seed: int,
        judges: Callable[[], Sequence[Judge]],
        advice: str,
    ) -> None:
        self.model, self.method, self.prompts, self.clusters = model, method, prompts, clusters
        self.settings, self.seed = settings, seed
        self._load, self.advice = judges, advice

    @cached_property
    def judges(self) -> Sequence[Judge]:
        """Those that judge."""
        return self._load()

    @cached_property
    def tower(self) -> HasFeatures | None:
        """Whose features say how far pictures have moved: those of the first judge that has any."""
        return next((j.reward for j in self.judges if isinstance(j.reward, HasFeatures)), None)

    @cached_property
    def base(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Numbers and features (N, D) of the base model's pictures."""
        return self._look(0)

    def __call__(self, step: int) -> Watched:
        """The model as it is after `step` steps; 0: the base model.

        Raises:
            UserError: weights of a judge are missing; a judge cannot judge these pictures or prompts;
                pictures or numbers that are not finite.
        """
        base, before = self.base
        if step == 0:
            means = {key: float(x.mean()) for key, x in base.items()}
            of = f"{len(self.prompts)} prompts, {len(set(self.clusters))} of them independent"
            text = ", ".join(f"{key} {number(mean)}" for key, mean in means.items())
            return Watched(means, f"guard, base model: {text} ({of})")
        now, after = self._look(step)
        readings = self._compare(base, now)
        values: dict[str, float] = {}
        for r in readings:
            key, row = r.key, r.row
            values |= {
                key: row.aligned, f"{key}/change": row.difference, f"{key}/low": row.low,
                f"{key}/high": row.high,
            }  # fmt: skip
        words = [f"{r.words()} ({r.kind})" for r in readings if r.kind != DRIFT]
        words += [
            f"{r.key} {number(r.row.base)} -> {number(r.row.aligned)}" for r in readings if r.kind == DRIFT
        ]
        if before is not None and after is not None:
            values["feature_distance"] = float(1 - (before * after).sum(1).mean())
            words.append(f"feature_distance {number(values['feature_distance'])}")
        found = alarm(readings)
        cry = f"ALARM at step {step}: {'; '.join(found)}; {self.advice}" if found else ""
        return Watched(values, f"guard, step {step}: {'; '.join(words)}", cry)

    @torch.no_grad()
    def _look(self, step: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """key -> (N,) of the model as it is after `step` steps, and features (N, D)."""
        seeds = picture_seeds(self.seed, len(self.prompts))
        with self.method.attach(self.model, 1.0) if step else nullcontext():
            drawn = sample(self.model, self.prompts, self.settings, seeds)
        who = f"the model after step {step}" if step else "the base model"
        if not torch.isfinite(drawn).all():
            raise UserError(
                f"guard: {who} draws pictures that are not finite; lower --lr, or --set model.dtype=float32"
            )
        pictures = list(to_uint8(drawn))
        found = {judge.key: self._numbers(judge, pictures, who) for judge in self.judges}
        if self.tower is None:
            return found | colours(pictures), None
        parts = [features(self.tower, pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
        return found | colours(pictures), np.concatenate(parts)

    def _numbers(self, judge: Judge, pictures: Sequence[np.ndarray], who: str) -> np.ndarray:
        reward, rows = judge.reward, []
        for i in range(0, len(pictures), BATCH):
            images = as_tensor(pictures[i : i + BATCH]).to(reward.device)
            numbers = reward.metrics(images, self.prompts[i : i + BATCH])[reward.headline]
            rows.append(numbers.double().cpu().numpy())
        x = np.concatenate(rows)
        if not np.isfinite(x).all():
            i = int(np.argmin(np.isfinite(x)))
            raise UserError(
                f"guard: {reward.name} gives {x[i]} for a picture of {who} ({self.prompts[i]!r}); look at "
                "the weights of the scorer, or leave it out of guard.scorers"
            )
        return x

    def _compare(self, base: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> list[Reading]:
        """The judges, whose p are corrected for one another, then the colours."""
        of = {judge.key: (judge.kind, judge.sign) for judge in self.judges}
        rows = {key: paired(base[key], now[key], self.clusters) for key in now}
        found: list[Reading] = []
        for family in ([key for key in rows if key in of], [key for key in rows if key not in of]):
            for key, p in zip(family, holm([rows[key].p for key in family]), strict=True):
                kind, sign = of.get(key, (DRIFT, 1.0))
                found.append(Reading(key, kind, rows[key], rows[key].judged(p, LEVEL), sign))
        return found


def alarm(readings: Sequence[Reading]) -> list[str]:
    """What is wrong, in words; nothing where chance may have done it.

    A held-out scorer fell: reward hacking if a reward that is trained on rose, else plain harm. Or saturation
    or clipped values changed by MOVED of what they were, and by LEAST.
    """
    fell = [r for r in readings if r.kind == HELD_OUT and r.verdict == LOSS]
    rose = [r for r in readings if r.kind == TRAINED and r.verdict == (GAIN if r.sign > 0 else LOSS)]
    moved = [
        r
        for r in readings
        if r.kind == DRIFT
        and r.verdict in (GAIN, LOSS)
        and abs(r.row.difference) >= LEAST
        and abs(relative_change(r.key, r.row.base, r.row.aligned)) >= MOVED
    ]
    found = []
    if fell:
        down = ", ".join(r.words() for r in fell)
        up = ", ".join(r.words() for r in rose)
        what = f"reward hacking, training gains {up} while held-out" if rose else "held-out"
        found.append(f"{what} {'scorers fall' if len(fell) > 1 else 'scorer falls'}: {down}")
    if moved:
        found.append(f"the pictures have moved: {', '.join(r.words() for r in moved)}")
    return found
