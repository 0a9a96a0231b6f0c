"""Statistics of a paired comparison: the same prompts and seeds, drawn by two models.

Letters: N pictures, G clusters (pictures of one prompt belong together), d = aligned - base per picture.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

INTERVALS = ("t", "bootstrap")
MIN_CLUSTERS = 10
"""With fewer prompts than this no difference is called a gain or a loss: the interval cannot be trusted."""
RESAMPLES = 4000
"""Bootstrap resamples."""

GAIN, LOSS, NO_CHANGE, TOO_FEW = "gain", "loss", "no significant change", "too few prompts"


def verdict_of(low: float, high: float, p_adjusted: float, level: float = 0.95) -> str:
    """Of enough prompts: gain or loss only where the interval excludes 0 and the corrected p is at most
    1 - level.
    """
    if p_adjusted > 1 - level or low <= 0 <= high:
        return NO_CHANGE
    return GAIN if low > 0 else LOSS


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval. n: pictures that count; clusters: distinct prompts among them."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class Paired:
    """Base against aligned on the same pictures.

    base, aligned: means over the n pictures where the metric is asked. difference: aligned - base, with its
    interval low .. high. p: two-sided, of no difference in the mean (paired t test, robust to clusters). up,
    down: prompts that got better and worse. sign_p: two-sided exact sign test over those prompts (for 0/1
    metrics with one picture per prompt: McNemar's exact test). interval: its kind.
    """

    base: float
    aligned: float
    difference: float
    low: float
    high: float
    p: float
    n: int
    clusters: int
    up: int
    down: int
    sign_p: float
    interval: str

    @property
    def verdict(self) -> str:
        """gain or loss only where the interval excludes 0."""
        return self.judged(0.0)

    def judged(self, p_adjusted: float, level: float = 0.95) -> str:
        """The verdict where many comparisons were made: gain or loss only where the interval excludes 0 and
        the p that was corrected for them (see `holm`) is at most 1 - level.
        """
        if self.clusters < MIN_CLUSTERS:
            return TOO_FEW
        return verdict_of(self.low, self.high, p_adjusted, level)

    @property
    def win_rate(self) -> float:
        """Share of the prompts that got better; those that did not move count half. NaN without any."""
        if not self.clusters:
            return math.nan
        return (self.up + (self.clusters - self.up - self.down) / 2) / self.clusters


def paired(
    base: np.ndarray,
    aligned: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    interval: str = "t",
    seed: int = 0,
) -> Paired:
    """Mean paired difference with its confidence interval.

    Args:
        base, aligned: (N,) one metric of picture i under both models; NaN where not asked, in both alike.
        clusters: N names; pictures of one name (prompt) depend on each other. Default: all independent.
        level: coverage of the interval.
        interval: "t": mean +- t(level, G - 1) * se, se robust to clusters (see `_cluster_se`); "bootstrap":
            percentiles of RESAMPLES draws of G clusters with replacement, from `seed` (see `_bootstrap`).
    Raises:
        ValueError: arrays of different length or NaN pattern, or an unknown interval.
    """
    base, aligned = np.asarray(base, float), np.asarray(aligned, float)
    if base.shape != aligned.shape or base.ndim != 1:
        raise ValueError(f"base and aligned must be (N,) alike, got {base.shape} and {aligned.shape}")
    if interval not in INTERVALS:
        raise ValueError(f"interval must be one of {', '.join(INTERVALS)}, got {interval!r}")
    asked = ~np.isnan(base)
    if (asked == np.isnan(aligned)).any():
        raise ValueError("base and aligned are not asked the same prompts: their NaN patterns differ")
    group = _groups(clusters, asked)
    d = (aligned - base)[asked]
    n, count = len(d), int(group.max(initial=-1)) + 1
    if n == 0:
        nan = math.nan
        return Paired(nan, nan, nan, nan, nan, nan, 0, 0, 0, 0, 1.0, interval)
    mean = float(d.mean())
    low, high = _bootstrap(d, group, level, seed) if interval == "bootstrap" else _t_interval(d, group, level)
    sums = np.bincount(group, d, count)
    up, down = int((sums > 1e-12).sum()), int((sums < -1e-12).sum())
    return Paired(
        float(base[asked].mean()),
        float(aligned[asked].mean()),
        mean,
        low,
        high,
        _t_test(d, group),
        n,
        count,
        up,
        down,
        sign_test(up, down),
        interval,
    )


def rate(values: np.ndarray, clusters: Sequence[Hashable] | None = None, *, level: float = 0.95) -> Estimate:
    """Mean of values in [0, 1] with Wilson's interval, which stays in [0, 1] and is never empty at 0 or 1.

    Values between 0 and 1 and clusters enter through the effective sample size m (1 - m) / se^2.

    Args:
        values: (N,) in [0, 1], NaN where not asked. clusters: as in `paired`.
    """
    values = np.asarray(values, float)
    asked = ~np.isnan(values)
    group = _groups(clusters, asked)
    x = values[asked]
    n, count = len(x), int(group.max(initial=-1)) + 1
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean = float(x.mean())
    se = _cluster_se(x, group) if count > 1 else 0.0
    size = mean * (1 - mean) / se**2 if se > 0 and 0 < mean < 1 else float(count)
    z = float(ndtri(0.5 + level / 2))
    centre = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2))
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n, count)


def mean_of(
    values: np.ndarray, clusters: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> Estimate:
    """Mean with its t interval, robust to clusters. values: (N,), NaN where not asked; clusters: as in
    `paired`.
    """
    values = np.asarray(values, float)
    asked = ~np.isnan(values)
    group = _groups(clusters, asked)
    x = values[asked]
    if len(x) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    return Estimate(float(x.mean()), *_t_interval(x, group, level), len(x), int(group.max()) + 1)


def sign_test(up: int, down: int) -> float:
    """Two-sided exact p of `up` rises and `down` falls if both were equally likely; 1 if nothing moved."""
    moved = up + down
    return min(1.0, 2 * float(bdtr(min(up, down), moved, 0.5))) if moved else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for being many, in the order given: all of them at most alpha by chance alone with
    probability at most alpha, whatever depends on what.

    Source: Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, least = [0.0] * len(p), 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, p[i] * (len(p) - k)))
        found[i] = least
    return found


def _groups(clusters: Sequence[Hashable] | None, asked: np.ndarray) -> np.ndarray:
    """(n,) cluster number 0 .. G-1 of every asked picture."""
    if clusters is None:
        return np.arange(int(asked.sum()))
    if len(clusters) != len(asked):
        raise ValueError(f"{len(asked)} pictures but {len(clusters)} cluster names")
    numbers: dict[Hashable, int] = {}
    return np.array(
        [numbers.setdefault(c, len(numbers)) for c, a in zip(clusters, asked, strict=True) if a], int
    )


def _cluster_se(d: np.ndarray, group: np.ndarray) -> float:
    """Standard error of the mean: sqrt(G / (G - 1) * sum_g (sum_{i in g} (d_i - mean))^2) / n.

    With one picture per cluster this is the ordinary sd / sqrt(n). Source: Liang and Zeger 1986, with the
    usual G / (G - 1) correction.
    """
    count = int(group.max()) + 1
    sums = np.bincount(group, d - d.mean(), count)
    return math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(d)


def _t_interval(d: np.ndarray, group: np.ndarray, level: float) -> tuple[float, float]:
    count = int(group.max()) + 1
    if count < 2:
        return -math.inf, math.inf
    half = float(stdtrit(count - 1, 0.5 + level / 2)) * _cluster_se(d, group)
    return float(d.mean()) - half, float(d.mean()) + half


def _t_test(d: np.ndarray, group: np.ndarray) -> float:
    """Two-sided p of a mean of 0; 1 where nothing moved. With one picture per cluster the
    ordinary paired t test.
    """
    count = int(group.max()) + 1
    mean = abs(float(d.mean()))
    if count < 2 or mean == 0:
        return 1.0
    se = _cluster_se(d, group)
    return 2 * float(stdtr(count - 1, -mean / se)) if se > 0 else 0.0


def _bootstrap(d: np.ndarray, group: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    """Percentiles of the mean of G clusters drawn with replacement.

    The plain percentile interval is too short for few clusters, as a normal interval with sd / G in place of
    the t interval with sd / (G - 1). So the percentiles are moved outwards by just that: the lower one is
    Phi(-sqrt(G / (G - 1)) t(level, G - 1)). Source: Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", the expanded percentile interval.
    """
    count = int(group.max()) + 1
    if count < 2:
        return -math.inf, math.inf
    tail = float(ndtr(-math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.5 + level / 2)))
    sums, sizes = np.bincount(group, d, count), np.bincount(group, minlength=count)
    alike = bool((sizes == sizes[0]).all())
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 200):
        drawn = rng.integers(count, size=(min(200, RESAMPLES - start), count), dtype=np.int32)
        n = count * sizes[0] if alike else sizes[drawn].sum(1)
        means[start : start + len(drawn)] = sums[drawn].sum(1) / n
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
