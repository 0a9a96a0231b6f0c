"""Paired statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align_cli.evaluation.stats import GAIN, LOSS, NO_CHANGE, TOO_FEW, paired, rate, sign_test

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
    assert 925 <= hits <= 970


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
