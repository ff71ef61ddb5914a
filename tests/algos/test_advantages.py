"""Advantage estimators: hand-worked numbers, slow references, sizes and ties, order in the group."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.algos import advantages as adv

ESTIMATORS = [adv.grpo, adv.dr_grpo, adv.rloo, adv.reinforce_pp, adv.reinforce_pp_baseline]
rewards_of_groups = st.lists(
    st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=1, max_size=6), min_size=1, max_size=5
)


def test_worked_by_hand() -> None:
    # r = 1, 0, 0, 1: mean 1/2, sample variance (4 * 1/4) / 3 = 1/3.
    group = [1.0, 0.0, 0.0, 1.0]
    half = np.array([0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(adv.grpo([group], eps=0.0)[0], half * math.sqrt(3))
    np.testing.assert_allclose(adv.grpo([group], eps=1.0)[0], half / (math.sqrt(1 / 3) + 1))
    np.testing.assert_allclose(adv.dr_grpo([group], eps=9.0)[0], half)
    # The other three of the first: 0, 0, 1 -> 1 - 1/3; of the second: 1, 0, 1 -> 0 - 2/3.
    np.testing.assert_allclose(adv.rloo([group], eps=9.0)[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    # Batch 1, 0 | 3: mean 4/3, variance ((1/9) + (16/9) + (25/9)) / 2 = 7/3.
    first, second = adv.reinforce_pp([[1.0, 0.0], [3.0]], eps=0.0)
    np.testing.assert_allclose(first, np.array([-1 / 3, -4 / 3]) / math.sqrt(7 / 3))
    np.testing.assert_allclose(second, [5 / 3 / math.sqrt(7 / 3)])
    # Centred: 1/2, -1/2 | -2, 2: variance (1/4 + 1/4 + 4 + 4) / 3 = 17/6.
    first, second = adv.reinforce_pp_baseline([[1.0, 0.0], [0.0, 4.0]], eps=0.0)
    np.testing.assert_allclose(first, np.array([0.5, -0.5]) / math.sqrt(17 / 6))
    np.testing.assert_allclose(second, np.array([-2.0, 2.0]) / math.sqrt(17 / 6))


def slow(name: str, groups: list[list[float]], eps: float) -> list[list[float]]:
    """The definitions, one number at a time."""
    everything = [r for g in groups for r in g]
    centered = [r - sum(g) / len(g) for g in groups for r in g]
    result = []
    for g in groups:
        row = []
        for i, r in enumerate(g):
            mean = sum(g) / len(g)
            others = [x for j, x in enumerate(g) if j != i]
            if name == "grpo":
                row.append((r - mean) / (statistics.stdev(g) + eps) if len(g) > 1 else 0.0)
            elif name == "dr_grpo":
                row.append(r - mean)
            elif name == "rloo":
                row.append(r - sum(others) / len(others) if others else 0.0)
            elif name == "reinforce_pp":
                std = statistics.stdev(everything) if len(everything) > 1 else 0.0
                row.append((r - sum(everything) / len(everything)) / (std + eps))
            else:
                std = statistics.stdev(centered) if len(centered) > 1 else 0.0
                row.append((r - mean) / (std + eps))
        result.append(row)
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(groups=rewards_of_groups)
def test_against_the_slow_definition(estimator, groups) -> None:
    for got, expected in zip(estimator(groups, eps=1e-3), slow(estimator.__name__, groups, 1e-3), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(estimator) -> None:
    # 0.1 * 3 / 3 != 0.1 in floating point; with eps 0 that would become +-1.
    for groups in ([[0.1, 0.1, 0.1]], [[0.7]], [[2.0]] * 3):
        for values in estimator(groups, eps=0.0):
            assert (values == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_groups_and_empty_batches(estimator) -> None:
    assert estimator([], eps=1e-6) == []
    sizes = [len(a) for a in estimator([[], [1.0, 0.0], []], eps=1e-6)]
    assert sizes == [0, 2, 0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(groups=rewards_of_groups, seed=st.integers(0, 99))
def test_order_in_the_group_does_not_matter(estimator, groups, seed) -> None:
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(g)) for g in groups]
    shuffled = [[g[i] for i in order] for g, order in zip(groups, orders, strict=True)]
    plain = estimator(groups, eps=1e-3)
    for a, order, b in zip(plain, orders, estimator(shuffled, eps=1e-3), strict=True):
        np.testing.assert_allclose(a[order], b, atol=1e-9)
