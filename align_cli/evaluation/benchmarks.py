"""Benchmarks: where prompts come from, and who judges the pictures.

A benchmark has `name`, `metrics`, `headline`, `prompts`, `judge` and `floor`; registry.py lists them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from align_cli.errors import UserError
from align_cli.models.base import BaseModel
from align_cli.pictures import Note, to_uint8
from align_cli.settings import SampleSettings
from align_cli.shapes.captions import Prompt, parse
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.oracle import METRICS, judge
from align_cli.shapes.world import SIZE, SPLITS

HEADLINE = "all"
"""The metric that decides, fixed before any run: all that is asked for is there, and no object more."""


class ShapesBenchmark:
    """Exact alignment on held-out compositions of the shapes world, read by a program: no learned judge."""

    name = "shapes"
    metrics: tuple[str, ...] = (*(m for m in METRICS if m != HEADLINE), HEADLINE)
    headline = HEADLINE

    def prompts(
        self, n: int, seed: int, *, split: str = "test", kinds: tuple[str, ...] | None = None
    ) -> list[Prompt]:
        """`n` prompts, the same for the same arguments; of the held-out kinds unless others are named.

        Raises:
            UserError: no such split, or fewer than one prompt.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} (known: {', '.join(SPLITS)})")
        if n < 1:
            raise UserError(f"an evaluation needs at least one prompt, got {n}")
        return eval_prompts(n, seed, split=split, kinds=kinds)

    def suits(self, model: BaseModel) -> bool:
        """Does the model draw pictures that the oracle can read?"""
        return model.image_size == SIZE

    def judge(self, pictures: np.ndarray, prompts: list[Prompt]) -> dict[str, np.ndarray]:
        """metric -> (N,) in [0, 1], NaN where the prompt does not ask. pictures: (N, H, W, 3) uint8."""
        return judge(pictures, [p.spec for p in prompts])

    def floor(
        self, pictures: np.ndarray, prompts: list[Prompt], *, seed: int = 0, rounds: int = 4
    ) -> dict[str, float]:
        """What pictures score without any alignment: judged against the prompt of another picture.

        Prompts are shuffled within their kind, so the floor keeps what the kind alone gives away (the number
        of objects); pairings that ask for the same objects are left out. Mean over `rounds` shuffles.

        Returns:
            metric -> mean in [0, 1]; NaN where no pairing asks for the metric.
        """
        rng = np.random.default_rng([seed, 50])
        shown: list[int] = []
        asked: list[Prompt] = []
        for _ in range(rounds):
            for kind in sorted({p.kind for p in prompts}):
                members = rng.permutation([i for i, p in enumerate(prompts) if p.kind == kind])
                for own, other in zip(members, np.roll(members, 1), strict=True):
                    if not same_objects(prompts[own], prompts[other]):
                        shown.append(int(own))
                        asked.append(prompts[other])
        if not shown:
            return dict.fromkeys(self.metrics, float("nan"))
        values = self.judge(pictures[shown], asked)
        return {
            name: float(np.nanmean(x)) if not np.isnan(x).all() else float("nan")
            for name, x in values.items()
            if name in self.metrics
        }


def measure(
    model: BaseModel, prompts: list[Prompt], settings: SampleSettings, seed: int
) -> dict[str, np.ndarray]:
    """Draw the prompts with the model as it is now, and judge the pictures: metric -> (N,), in memory."""
    from align_cli.sampling import picture_seeds, sample

    drawn = sample(model, [p.text for p in prompts], settings, picture_seeds(seed, len(prompts)))
    return ShapesBenchmark().judge(to_uint8(drawn), prompts)


def compositions(prompts: Sequence[Prompt]) -> list[Hashable]:
    """What each prompt asks to be drawn, whatever its words: prompts of one composition are no independent
    evidence, so the intervals are clustered by it.
    """
    return [tuple(sorted(p.spec.objects)) for p in prompts]


def same_objects(a: Prompt, b: Prompt) -> bool:
    """Do the two prompts ask for the same objects, whatever relation and background they add?"""
    return sorted(a.spec.objects) == sorted(b.spec.objects)


def wrong(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Single metrics of a picture that are not fully met; empty where everything asked for is true. values:
    metric -> number, None or NaN where not asked.
    """
    single = {name: value for name, value in values.items() if name not in ("all", "facts")}
    return tuple(name for name, value in single.items() if value is not None and value < 1)


def verdict_note(missed: tuple[str, ...]) -> Note:
    """What is written below a judged picture."""
    return Note("wrong: " + ", ".join(missed), False) if missed else Note("all correct", True)


def check_pictures(model: BaseModel, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> list[Note]:
    """A note per picture: right or wrong, empty for prompts outside the grammar. None for other models."""
    if not ShapesBenchmark().suits(model):
        return []
    notes = [Note("")] * len(texts)
    for i, text in enumerate(texts):
        try:
            spec = parse(text)
        except UserError:
            continue
        found = {name: float(x[0]) for name, x in judge(pictures[i][None], [spec]).items()}
        notes[i] = verdict_note(wrong(found))
    return notes if any(note.text for note in notes) else []
