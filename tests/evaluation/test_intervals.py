"""Estimates against hand-worked and brute-force values."""

from itertools import combinations
from math import gamma, pi

import numpy as np
import pytest

from rlpost.evaluation.intervals import T_975, bootstrap_mean, paired_difference, pass_at_k, t_interval


def test_pass_at_k_equals_counting_all_subsets():
    for n in range(1, 7):
        for c in range(n + 1):
            outcomes = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(outcomes, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_refuses_more_than_there_is(k):
    with pytest.raises(ValueError, match="number of samples"):
        pass_at_k(3, 1, k)


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).random(400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.2 * half)


def test_pairing_removes_the_problems_own_difficulty():
    difficulty = np.random.default_rng(0).random(300)
    gain = paired_difference(difficulty, difficulty + 0.1)
    assert gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="paired"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="no problems"):
        bootstrap_mean(np.zeros(0))


def test_t_interval_by_hand():
    # 1, 2, 3, 4, 5: mean 3, s = sqrt(2.5), t(0.975, 4) = 2.7764, half width 2.7764 x sqrt(2.5 / 5) = 1.9632
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (interval.low, interval.mean, interval.high) == pytest.approx((1.0368, 3.0, 4.9632), abs=1e-4)
    assert t_interval([2.0, 2.0]).low == 2.0


def test_the_t_table_leaves_five_percent_outside():
    for degrees, quantile in enumerate(T_975, start=1):
        x = np.linspace(0.0, quantile, 100_001)
        scale = gamma((degrees + 1) / 2) / (gamma(degrees / 2) * (degrees * pi) ** 0.5)
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        inside = 2 * np.trapezoid(density, x)
        assert inside == pytest.approx(0.95, abs=5e-6), degrees


@pytest.mark.parametrize("n", [1, 22])
def test_t_interval_refuses_what_it_has_no_quantile_for(n):
    with pytest.raises(ValueError, match="expected 2 to 21"):
        t_interval([0.0] * n)
