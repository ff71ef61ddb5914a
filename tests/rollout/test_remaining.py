"""The remaining-length estimate: hand-worked numbers, and its worth on lengths with and without a group's part."""

import math

import numpy as np
import pytest

from rlpost.rollout.remaining import LengthEstimate, intraclass_correlation, product_limit


def estimate(groups, unfinished=(), cap=100):
    return LengthEstimate(groups, unfinished, cap=cap)


def test_product_limit_by_hand():
    # Ends at 2, 4, 4, 8; still going at 3 and 9. At risk: 6, 4, 2. S: 5/6, 5/6 x 2/4, 5/12 x 1/2.
    lengths, mass = product_limit([2, 4, 4, 8], [3, 9], cap=20)
    assert lengths.tolist() == [2, 4, 8, 20]
    np.testing.assert_allclose(mass, [1 / 6, 5 / 12, 5 / 24, 5 / 24])
    lengths, mass = product_limit([2, 20], [20], cap=20)  # what is left above the longest lies at the cap already
    assert lengths.tolist() == [2, 20] and mass.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert [a.tolist() for a in product_limit([], [], cap=20)] == [[20], [1]]


def test_mean_residual_life_by_hand():
    made = estimate([[10], [20], [60]])  # groups of one: nothing to correlate
    assert made.remaining(0) == pytest.approx(30)
    assert made.remaining(10) == pytest.approx(30)  # (20 + 60) / 2 - 10
    assert made.remaining(20) == pytest.approx(40)
    assert made.remaining(60) == pytest.approx(20)  # older than any seen: half-way to the cap of 100
    assert estimate([]).remaining(0) == 100 and not estimate([]).is_known


def test_unfinished_responses_keep_the_first_steps_from_predicting_short_ones():
    assert estimate([[10, 10]]).remaining(0) == pytest.approx(10)
    assert estimate([[10, 10]], unfinished=[50, 50]).remaining(0) == pytest.approx(0.5 * 10 + 0.5 * 100)


def test_ages_in_a_refilled_slot_by_hand_and_by_watching_one():
    mean, deviation = estimate([[10, 30]]).ages()
    assert mean == pytest.approx((100 + 900) / 2 / (2 * 20))
    assert deviation == pytest.approx(math.sqrt((1000 + 27000) / 2 / (3 * 20) - 12.5**2))
    rng = np.random.default_rng(0)
    watched = np.concatenate([np.arange(n) for n in rng.choice([10, 30], 20_000)])
    assert watched.mean() == pytest.approx(mean, abs=0.6) and watched.std() == pytest.approx(deviation, abs=0.3)


def test_intraclass_correlation_by_hand():
    # Means 1 and 3: MSB = 2 x 2 / 1 = 4; MSW = (0.5 + 0.5) / 2 = 0.5; (4 - 0.5) / (4 + 0.5).
    assert intraclass_correlation([[0.5, 1.5], [2.5, 3.5]]) == pytest.approx(3.5 / 4.5)
    assert intraclass_correlation([[1, 1], [3, 3]]) == 1.0
    assert intraclass_correlation([[1, 3], [3, 1]]) == 0.0, "means that agree better than chance"
    assert intraclass_correlation([[1, 2]]) == intraclass_correlation([[1], [2]]) == intraclass_correlation([]) == 0.0


def test_siblings_move_and_narrow_the_distribution_by_hand():
    made = estimate([[1, 1], [math.e**2, math.e**2]], cap=1000)  # logs 0 and 2 (7 tokens and a bit): mu 1, rho 1
    assert made.correlation == 1.0
    assert made.remaining(0, finished=[20]) == pytest.approx(20), "with rho 1 a sibling says it all"
    half = estimate([[2, 8], [8, 32]], cap=10_000)
    rho = half.correlation
    logs = np.log([2, 8, 8, 32])
    mu = logs.mean()
    blend = 2 * rho / (1 + rho)
    shifted = mu + blend * (math.log(64) - mu) + math.sqrt(1 - rho * blend) * (logs - mu)
    assert half.remaining(0, finished=[64, 64]) == pytest.approx(np.exp(shifted).mean())
    assert half.remaining(0, ages=[1]) == pytest.approx(half.remaining(0)), "all live longer than a token: no news"
    assert half.remaining(0, ages=[9]) > half.remaining(0) > half.remaining(0, finished=[2])


def drawn_groups(rng, count, rho, *, median=64.0, cap=1024, size=8):
    shared = rng.normal(size=(count, 1)) * math.sqrt(rho)
    own = rng.normal(size=(count, size)) * math.sqrt(1 - rho)
    return np.minimum(cap, np.maximum(1, np.round(median * np.exp(shared + own)))).astype(int)


@pytest.mark.parametrize(("rho", "gain"), [(0.5, 0.9), (0.0, 1.01)])
def test_it_beats_the_marginal_mean_where_a_group_has_lengths_in_common(rho, gain):
    """Mean absolute error on groups frozen at a random moment, siblings done or cut off at the same age."""
    rng = np.random.default_rng(3)
    made = estimate(drawn_groups(rng, 200, rho).tolist(), cap=1024)
    ours, residual, marginal = [], [], []
    for lengths in drawn_groups(rng, 300, rho).tolist():
        age = int(rng.integers(0, 200))
        if lengths[0] <= age:
            continue
        done = [n for n in lengths[1:] if n <= age]
        left = lengths[0] - age
        ours.append(abs(left - made.remaining(age, finished=done, ages=[age] * (7 - len(done)))))
        residual.append(abs(left - made.remaining(age)))
        marginal.append(abs(left - max(0.0, made.remaining(0) - age)))
    assert np.mean(ours) < gain * np.mean(residual)
    assert np.mean(residual) < np.mean(marginal)
    assert (made.correlation > 0.4) == (rho > 0)


def test_the_estimate_never_leaves_the_possible():
    rng = np.random.default_rng(0)
    made = estimate(drawn_groups(rng, 50, 0.5).tolist(), unfinished=[5, 0, 700], cap=1024)
    for age in (0, 3, 64, 500, 1000, 1023):
        siblings = {"finished": [int(n) for n in rng.integers(1, 1024, 3)], "ages": [age, age]}
        assert 0 <= made.remaining(age, **siblings) <= 1024 - age
