"""Reward shaping (DAPO eq. 13, k1) and group filters."""

from __future__ import annotations

import numpy as np
import pytest

from rlpost.algos import filters, shaping
from tests.algos.making import group, sample, segment


def test_overlong_has_the_values_of_the_paper() -> None:
    # L_max 20,480, buffer 4,096: free up to 16,384, half-way -1/2, -1 at the limit and beyond.
    lengths = [1, 16_384, 18_432, 20_480, 30_000]
    got = shaping.overlong(lengths, max_tokens=20_480, buffer_tokens=4_096, penalty=1.0)
    np.testing.assert_allclose(got, [0.0, 0.0, -0.5, -1.0, -1.0])
    half = shaping.overlong([18_432], max_tokens=20_480, buffer_tokens=4_096, penalty=0.5)
    np.testing.assert_allclose(half, [-0.25])


def test_overlong_is_off_at_zero_and_takes_empty_groups() -> None:
    assert (shaping.overlong([5, 500], max_tokens=10, buffer_tokens=0, penalty=1.0) == 0).all()
    assert shaping.overlong([], max_tokens=10, buffer_tokens=5, penalty=1.0).shape == (0,)


def test_kl_in_reward() -> None:
    np.testing.assert_allclose(shaping.kl_in_reward([1.0, 0.0], [2.0, -1.0], 0.1), [0.8, 0.1])


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [([1.0, 0.0], None), ([1.0, 1.0], "equal_rewards"), ([0.0], "equal_rewards"), ([], "no_reward")],
)
def test_dynamic_sampling(rewards, reason) -> None:
    failed = sample(None, segment(3), failure="reward_error")
    assert filters.dynamic_sampling(group(*[sample(r, segment(2)) for r in rewards], failed)) == reason
    assert filters.none(group(failed)) is None
