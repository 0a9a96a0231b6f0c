"""What the numbers of an evaluation say: means, paired comparisons, verdicts that chance alone seldom gives.

Letters: N items (pictures that every arm drew).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align_cli.evaluation.stats import MIN_CLUSTERS, Estimate, Paired, holm, mean_of, paired, rate

Group = tuple[str, str]
"""(grouping, value): ("Category", "Animals")."""
Values = Mapping[str, Mapping[str, np.ndarray]]
"""metric -> arm -> (N,), NaN where the prompt does not ask or there is no picture."""


@dataclass(frozen=True)
class Design:
    """What is compared with what.

    arms: all of them. baseline: one of them. clusters: N names; pictures of one name are no independent
    evidence. groups: N tables grouping -> value. present: arm -> (N,) bool, whether there is a picture.
    interval: "t" or "bootstrap".
    """

    arms: tuple[str, ...]
    baseline: str
    clusters: Sequence[Hashable]
    groups: Sequence[Mapping[str, str]]
    present: Mapping[str, np.ndarray]
    interval: str = "bootstrap"
    seed: int = 0

    def group_values(self) -> list[Group]:
        """All groups, a grouping after the other, values in order of appearance."""
        names = list(dict.fromkeys(name for row in self.groups for name in row))
        return [
            (name, value)
            for name in names
            for value in dict.fromkeys(row[name] for row in self.groups if name in row)
        ]

    def rows(self, group: Group | None) -> np.ndarray:
        """(N,) bool: the items of a group, or all."""
        if group is None:
            return np.ones(len(self.groups), bool)
        return np.array([row.get(group[0]) == group[1] for row in self.groups], bool)


@dataclass(frozen=True)
class Metric:
    """A metric. scorer: whose; headline: the one of its scorer that decides; fraction: in [0, 1], a share."""

    name: str
    scorer: str
    headline: bool
    fraction: bool


@dataclass(frozen=True)
class Mean:
    """Mean of one arm."""

    arm: str
    metric: Metric
    group: Group | None
    estimate: Estimate


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline. p_adjusted: corrected for the other comparisons; 1 where there are too few
    prompts to tell.
    """

    arm: str
    metric: Metric
    group: Group | None
    row: Paired
    p_adjusted: float

    @property
    def verdict(self) -> str:
        """gain or loss only where the interval excludes 0 and the corrected p is at most 0.05."""
        return self.row.judged(self.p_adjusted)


def means(values: Values, metrics: Sequence[Metric], design: Design) -> list[Mean]:
    """Means of all arms: every metric over all items, the headlines per group, too."""
    found = []
    for metric, group in _wanted(metrics, design):
        rows = design.rows(group)
        for arm in design.arms:
            x, names = values[metric.name][arm][rows], _take(design.clusters, rows)
            estimate = rate(x, names) if metric.fraction else mean_of(x, names)
            found.append(Mean(arm, metric, group, estimate))
    return found


def compare(values: Values, metrics: Sequence[Metric], design: Design) -> list[Comparison]:
    """Every arm against the baseline.

    Many comparisons find something by chance. The p values of the headlines over all items (one per arm and
    scorer) are corrected together by Holm's method, and those of all that one looks at besides, groups and
    other metrics, together as a second family: what was to be decided does not pay for a look into corners.
    Comparisons of fewer than MIN_CLUSTERS prompts, which are never called anything, count in neither.
    """
    found: list[tuple[str, Metric, Group | None, Paired]] = []
    for metric, group in _wanted(metrics, design):
        rows = design.rows(group)
        for arm in design.arms:
            if arm == design.baseline:
                continue
            both = design.present[arm] & design.present[design.baseline]
            base = np.where(both, values[metric.name][design.baseline], np.nan)[rows]
            own = np.where(both, values[metric.name][arm], np.nan)[rows]
            names = _take(design.clusters, rows)
            row = paired(base, own, names, interval=design.interval, seed=design.seed)
            found.append((arm, metric, group, row))
    adjusted = [1.0] * len(found)
    for first in (True, False):
        family = [
            i
            for i, (_, metric, group, row) in enumerate(found)
            if (metric.headline and group is None) == first and row.clusters >= MIN_CLUSTERS
        ]
        for i, p in zip(family, holm([found[i][3].p for i in family]), strict=True):
            adjusted[i] = p
    return [Comparison(*entry, p) for entry, p in zip(found, adjusted, strict=True)]


def _wanted(metrics: Sequence[Metric], design: Design) -> list[tuple[Metric, Group | None]]:
    """All metrics over all items, then the headlines by group."""
    groups = design.group_values()
    every: list[tuple[Metric, Group | None]] = [(metric, None) for metric in metrics]
    return every + [(metric, group) for metric in metrics if metric.headline for group in groups]


def _take(names: Sequence[Hashable], rows: np.ndarray) -> list[Hashable]:
    return [names[int(i)] for i in np.nonzero(rows)[0]]
