"""Paired statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from align_cli.evaluation.stats import (
    GAIN,
    LOSS,
    NO_CHANGE,
    TOO_FEW,
    holm,
    mean_of,
    paired,
    rate,
    sign_test,
)

NAN = math.nan


def test_t_interval_by_hand():
    # d = 1, 0, 0, 1: mean 1/2, variance 1/3, se = sqrt(1/3) / 2 = 0.288675, t(0.975, 3) = 3.182446
    result = paired(np.array([0, 0, 1, 0.0]), np.array([1, 0, 1, 1.0]))
    assert (result.base, result.aligned, result.difference, result.n) == (0.25, 0.75, 0.5, 4)
    assert result.low == pytest.approx(0.5 - 0.918693, abs=1e-6)
    assert result.high == pytest.approx(0.5 + 0.918693, abs=1e-6)
    assert (result.up, result.down) == (2, 0)
    assert result.sign_p == 0.5


def test_not_asked_prompts_do_not_count():
    result = paired(np.array([0, NAN, 1, 0, 0.0]), np.array([1, NAN, 1, 0, 1.0]))
    assert (result.n, result.clusters, result.difference) == (4, 4, 0.5)
    assert result.high == pytest.approx(0.5 + 0.918693, abs=1e-6)
    empty = paired(np.array([NAN]), np.array([NAN]))
    assert empty.n == 0
    assert math.isnan(empty.difference)
    assert empty.verdict == TOO_FEW


def test_different_questions_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        paired(np.array([0, NAN]), np.array([0, 1.0]))
    with pytest.raises(ValueError, match="alike"):
        paired(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="interval"):
        paired(np.zeros(2), np.zeros(2), interval="gauss")
    with pytest.raises(ValueError, match="cluster"):
        paired(np.zeros(2), np.zeros(2), ["a"])


def test_clusters_by_hand():
    # d = 1, 1, 0, 0 in clusters a a b b: mean 1/2, sums of deviations +1 and -1,
    # se = sqrt(2/1 * 2) / 4 = 1/2, t(0.975, 1) = 12.706205; as independent pictures se is only 0.288675
    d = np.array([1, 1, 0, 0.0])
    result = paired(np.zeros(4), d, ["a", "a", "b", "b"])
    assert result.clusters == 2
    assert result.high - 0.5 == pytest.approx(12.706205 / 2, abs=1e-5)
    assert result.up == 1
    assert result.down == 0
    assert paired(np.zeros(4), d).high - 0.5 == pytest.approx(0.918693, abs=1e-6)


def test_copies_of_a_prompt_add_no_evidence():
    rng = np.random.default_rng(0)
    d = rng.integers(-1, 2, 40).astype(float)
    once = paired(np.zeros(40), d)
    thrice = paired(np.zeros(120), np.repeat(d, 3), list(np.repeat(np.arange(40), 3)))
    assert thrice.low == pytest.approx(once.low)
    assert thrice.high == pytest.approx(once.high)


def test_bootstrap_is_seeded_and_near_t():
    rng = np.random.default_rng(1)
    base, aligned = (rng.random(600) < 0.4).astype(float), (rng.random(600) < 0.5).astype(float)
    t = paired(base, aligned)
    b = paired(base, aligned, interval="bootstrap", seed=3)
    assert b == paired(base, aligned, interval="bootstrap", seed=3)
    assert b.low == pytest.approx(t.low, abs=0.006)
    assert b.high == pytest.approx(t.high, abs=0.006)
    assert b.low != paired(base, aligned, interval="bootstrap", seed=4).low


def test_interval_covers_the_truth_95_percent_of_the_time():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        d = rng.choice([-1.0, 0.0, 1.0], size=100, p=[0.1, 0.7, 0.2])
        result = paired(np.zeros(100), d)
        hits += result.low <= 0.1 <= result.high
    assert 930 <= hits <= 970


def test_verdicts():
    zeros = np.zeros(20)
    up = np.r_[np.ones(10), np.zeros(10)]
    assert paired(zeros, up).verdict == GAIN
    assert paired(up, zeros).verdict == LOSS
    assert paired(zeros, zeros).verdict == NO_CHANGE
    assert paired(zeros, np.r_[1.0, np.zeros(19)]).verdict == NO_CHANGE
    assert paired(np.zeros(5), np.ones(5)).verdict == TOO_FEW
    one = paired(np.zeros(1), np.ones(1))
    assert (one.low, one.high, one.verdict) == (-math.inf, math.inf, TOO_FEW)


def test_sign_test_by_hand():
    # 1 of 6: 2 * (1 + 6) / 64
    assert sign_test(5, 1) == pytest.approx(14 / 64)
    assert sign_test(3, 3) == 1.0
    assert sign_test(0, 0) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)


def test_wilson_by_hand():
    # 2 of 10, z = 1.959964, n_eff = n - 1 because se uses the unbiased variance:
    # centre (0.2 + z^2/18) / (1 + z^2/9) = 0.289744, half = 0.236 (see the formula)
    z, m, n = 1.959964, 0.2, 9
    centre = (m + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(m * (1 - m) / n + z**2 / (4 * n**2))
    result = rate(np.array([1, 1] + [0] * 8, float))
    assert (result.low, result.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert centre == pytest.approx(0.28974, abs=1e-4)
    none = rate(np.zeros(10))
    assert none.low == 0
    assert none.high == pytest.approx(0.27753, abs=1e-4)
    assert math.isnan(rate(np.array([NAN])).mean)


def test_against_scipy():
    rng = np.random.default_rng(3)
    base = rng.normal(size=60)
    aligned = base + rng.normal(0.2, 0.5, size=60)
    d = aligned - base
    result = paired(base, aligned)
    test = scipy_stats.ttest_rel(aligned, base)
    assert result.p == pytest.approx(test.pvalue, rel=1e-9)
    interval = test.confidence_interval()
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    up = int((d > 0).sum())
    assert result.sign_p == pytest.approx(scipy_stats.binomtest(up, 60).pvalue, rel=1e-9)
    assert result.win_rate == up / 60
    alone = scipy_stats.ttest_1samp(base, 0).confidence_interval()
    one = mean_of(base)
    assert (one.mean, one.low, one.high) == pytest.approx((base.mean(), alone.low, alone.high), rel=1e-9)
    # scipy's percentiles are not moved outwards, which at n = 60 is a factor of about 1.03
    other = scipy_stats.bootstrap((d,), np.mean, method="percentile", random_state=0, n_resamples=4000)
    boot = paired(base, aligned, interval="bootstrap")
    width = other.confidence_interval.high - other.confidence_interval.low
    assert (boot.high - boot.low) / width == pytest.approx(1.03, abs=0.05)
    assert (boot.low + boot.high) / 2 == pytest.approx(d.mean(), abs=0.02)


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0.3, 1, 12)


def skewed(rng: np.random.Generator) -> np.ndarray:
    return rng.exponential(1, 60) - 0.7


def clustered(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.normal(0.3, 1, 24), 3) + rng.normal(0, 1, 72)


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "clusters"), [(normal, 12), (skewed, 60), (clustered, 24)])
def test_the_bootstrap_covers_the_truth_95_percent_of_the_time(draw, clusters):
    """Of 12 normal numbers 4,000 simulations gave 94.8 % (t interval: 95.0 %), so 1,000 give 93 to 97 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(1000):
        d = draw(rng)
        names = [i * clusters // len(d) for i in range(len(d))]
        result = paired(np.zeros(len(d)), d, names, interval="bootstrap", seed=seed)
        hits += result.low <= 0.3 <= result.high
    assert 930 <= hits <= 970


def test_p_of_clusters_and_of_nothing():
    zeros = np.zeros(4)
    assert paired(zeros, zeros).p == 1
    assert paired(zeros, np.ones(4)).p == 0
    assert paired(np.zeros(1), np.ones(1)).p == 1
    # the clusters of test_clusters_by_hand: t = 1 with one degree of freedom, p = 1 - 2 atan(1) / pi = 1/2
    assert paired(zeros, np.array([1, 1, 0, 0.0]), ["a", "a", "b", "b"]).p == pytest.approx(0.5)


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04 times 4 3 2 1, and never below a smaller one
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_keeps_false_gains_rare():
    """Twenty comparisons of nothing: one in twenty families has a p of at most 0.05 after correction."""
    rng = np.random.default_rng(7)
    p = scipy_stats.ttest_1samp(rng.normal(size=(400, 20, 30)), 0, axis=2).pvalue
    assert (np.min(p, axis=1) <= 0.05).mean() > 0.5
    corrected = np.array([min(holm(list(row))) for row in p])
    assert 0.02 <= (corrected <= 0.05).mean() <= 0.08


def test_a_verdict_needs_the_corrected_p():
    gain = paired(np.zeros(20), np.r_[np.ones(10), np.zeros(10)])
    assert gain.judged(0.05) == GAIN
    assert gain.judged(0.051) == NO_CHANGE
    assert paired(np.zeros(5), np.ones(5)).judged(0.0) == TOO_FEW


def test_win_rate_counts_ties_half():
    result = paired(np.zeros(4), np.array([1, 0, 0, -1.0]))
    assert result.win_rate == 0.5
    assert paired(np.zeros(4), np.array([1, 1, 0, 0.0])).win_rate == 0.75
    assert math.isnan(paired(np.array([NAN]), np.array([NAN])).win_rate)
