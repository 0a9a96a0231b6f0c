"""What an evaluation returns: numbers, what they were measured on, and pictures to look at."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Group

from align_cli.evaluation import tables
from align_cli.evaluation.benchmarks import verdict_note
from align_cli.evaluation.stats import Estimate, Paired
from align_cli.pictures import contact_sheet


@dataclass(frozen=True)
class RunFacts:
    """What an evaluation ran on, so that its numbers can be made again."""

    benchmark: str
    model: str
    adapters: tuple[str, ...]
    prompts: int
    distinct_prompts: int
    kinds: dict[str, int]
    split: str
    seed: int
    sample: dict[str, object]
    device: str
    dtype: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int


@dataclass(frozen=True)
class Example:
    """One prompt to look at: (H, W, 3) uint8 pictures and the metrics that are not fully met."""

    prompt: str
    base: np.ndarray
    aligned: np.ndarray
    base_wrong: tuple[str, ...]
    aligned_wrong: tuple[str, ...]


@dataclass(frozen=True)
class BaseResult:
    """A model on its own. rows: metric -> estimate; kinds: prompt kind -> metric -> estimate."""

    facts: RunFacts
    headline: str
    rows: dict[str, Estimate]
    kinds: dict[str, dict[str, Estimate]]
    floor: dict[str, float]
    examples: list[Example] = field(repr=False)

    def to_table(self, width: int = 100) -> Group:
        """What is printed."""
        return tables.base_table(self, width)

    def to_json(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dicts; None where there is no number."""
        return {
            "kind": "single",
            **_facts_json(self.facts, self.headline, self.floor),
            "metrics": {name: _plain(asdict(row)) for name, row in self.rows.items()},
            "by_kind": {
                k: {name: _plain(asdict(r)) for name, r in rows.items()} for k, rows in self.kinds.items()
            },
        }

    def save_picture(self, path: Path) -> None:
        """PNG of the first prompts of each kind."""
        rows, captions = [[e.base] for e in self.examples], [e.prompt for e in self.examples]
        notes = [[verdict_note(e.base_wrong)] for e in self.examples]
        contact_sheet(
            rows, captions, path, headers=(self.facts.model,), notes=notes, title=_picture_title(self.facts)
        )


@dataclass(frozen=True)
class PairedResult:
    """Base against aligned. rows: metric -> comparison; kinds: prompt kind -> metric -> comparison.

    floor: metric -> what the base model's pictures score against prompts of other pictures.
    """

    facts: RunFacts
    headline: str
    rows: dict[str, Paired]
    kinds: dict[str, dict[str, Paired]]
    floor: dict[str, float]
    examples: list[Example] = field(repr=False)

    def to_table(self, width: int = 100) -> Group:
        """What is printed."""
        return tables.paired_table(self, width)

    def to_json(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dicts; None where there is no number."""
        return {
            "kind": "paired",
            **_facts_json(self.facts, self.headline, self.floor),
            "verdict": self.rows[self.headline].verdict,
            "metrics": {name: _paired_json(row) for name, row in self.rows.items()},
            "by_kind": {
                k: {name: _paired_json(r) for name, r in rows.items()} for k, rows in self.kinds.items()
            },
        }

    def save_picture(self, path: Path) -> None:
        """Side-by-side PNG: prompt, base, aligned; the first prompts of each kind, not picked by result."""
        rows = [[e.base, e.aligned] for e in self.examples]
        notes = [[verdict_note(e.base_wrong), verdict_note(e.aligned_wrong)] for e in self.examples]
        captions = [e.prompt for e in self.examples]
        contact_sheet(
            rows, captions, path, headers=("base", "aligned"), notes=notes, title=_picture_title(self.facts)
        )


def _picture_title(facts: RunFacts) -> str:
    return (
        f"{facts.model}, {facts.split} split of the {facts.benchmark} benchmark: first prompts of each kind, "
        f"not picked by result"
    )


def _facts_json(facts: RunFacts, headline: str, floor: dict[str, float]) -> dict[str, object]:
    return {**asdict(facts), "adapters": list(facts.adapters), "headline": headline, "floor": _plain(floor)}


def _paired_json(row: Paired) -> dict[str, object]:
    return {**_plain(asdict(row)), "verdict": row.verdict}


def _plain(values: dict[str, object] | dict[str, float]) -> dict[str, object]:
    """JSON has no NaN and no infinity: None instead."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
