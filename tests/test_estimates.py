"""Estimates against hand-worked and brute-force values."""

from itertools import combinations

import numpy as np
import pytest

from rlpost.estimates import bootstrap_mean, paired_difference, pass_at_k


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
