"""The distribution of response lengths: hand-worked numbers, and responses that are cut off while they run."""

import math

import numpy as np
import pytest

from rlpost.rollout.lengths import LengthEstimate, product_limit


def test_product_limit_by_hand():
    # Ends at 2, 4, 4, 8; still going at 3 and 9. At risk: 6, 4, 2. S: 5/6, 5/6 x 2/4, 5/12 x 1/2.
    lengths, mass = product_limit([2, 4, 4, 8], [3, 9], cap=20)
    assert lengths.tolist() == [2, 4, 8, 20]
    np.testing.assert_allclose(mass, [1 / 6, 5 / 12, 5 / 24, 5 / 24])
    lengths, mass = product_limit([2, 20], [20], cap=20)  # what is left above the longest lies at the cap already
    assert lengths.tolist() == [2, 20] and mass.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert [a.tolist() for a in product_limit([], [], cap=20)] == [[20], [1]]


def test_responses_cut_off_while_they_run_do_not_hide_the_long_ones():
    """Of responses begun one after the other and seen at one moment, the short ones are done."""
    rng = np.random.default_rng(0)
    true = np.minimum(1024, np.round(np.exp(rng.normal(math.log(64), 1, 4000)))).astype(int)
    age = rng.integers(0, 400, 4000)  # when each was begun, before the moment
    done = true <= age
    lengths, mass = product_limit(true[done].tolist(), age[~done].tolist(), cap=1024)
    estimate, naive = float((lengths * mass).sum()), float(true[done].mean())
    assert naive < 0.75 * true.mean() and abs(estimate - true.mean()) < 0.2 * true.mean()


def test_ages_in_a_refilled_slot_by_hand_and_by_watching_one():
    mean, deviation = LengthEstimate([10, 30], [0], cap=100).ages()
    assert mean == pytest.approx((100 + 900) / 2 / (2 * 20))
    assert deviation == pytest.approx(math.sqrt((1000 + 27000) / 2 / (3 * 20) - 12.5**2))
    rng = np.random.default_rng(0)
    watched = np.concatenate([np.arange(n) for n in rng.choice([10, 30], 20_000)])
    assert watched.mean() == pytest.approx(mean, abs=0.6) and watched.std() == pytest.approx(deviation, abs=0.3)


def test_nothing_is_known_before_a_response_is_done():
    assert not LengthEstimate([], [5, 7], cap=100).is_known
    assert LengthEstimate([0], [], cap=100).is_known, "an empty response is one"
