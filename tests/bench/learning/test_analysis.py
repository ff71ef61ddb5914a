"""Comparisons against numbers worked by hand, and what may be claimed when."""

import dataclasses

import pytest

from rlpost.bench.learning.analysis import (
    NO_WORSE,
    NOT_SHOWN,
    accuracy_at,
    band_of,
    behind,
    compare,
    last_gain,
    samples_at,
)
from rlpost.bench.learning.cells import CORRECTED, PLAIN, SYNC, main_cell
from rlpost.bench.learning.page import make_report
from tests.bench.learning.rows import row, table


def test_pairs_are_of_one_seed_and_the_interval_is_students():
    rows = table("grpo", {SYNC: [0.80, 0.70, 0.75], CORRECTED: [0.81, 0.72, 0.75]})
    found = compare(reversed_order(rows), "grpo", CORRECTED)
    assert found.seeds == (0, 1, 2) and found.points == pytest.approx((1.0, 2.0, 0.0))
    # mean 1, sample standard deviation 1, t(0.975, 2) = 4.3027, 4.3027 / sqrt(3) = 2.4842
    assert (found.interval.low, found.interval.high) == pytest.approx((1 - 2.4842, 1 + 2.4842), abs=1e-4)


def reversed_order(rows):
    """A table's rows come in any order."""
    return list(reversed(rows))


def test_nothing_is_claimed_before_all_seeds_are_there():
    accuracies = {SYNC: [0.8] * 5, CORRECTED: [0.801, 0.800, 0.802, 0.801, 0.800]}
    rows = table("grpo", accuracies)
    assert compare(rows, "grpo", CORRECTED).conclusion == NO_WORSE
    some = compare(rows[:-1], "grpo", CORRECTED)
    assert some.interval.low > -2 and not some.is_complete and some.conclusion == NOT_SHOWN


@pytest.mark.parametrize(
    "points, conclusion",
    [
        # 5 seeds: half width 2.7764 s / sqrt(5); s = 1 point: 1.2416
        ((-1.0, -1.0, -1.0, 0.0, 0.0), NO_WORSE),  # mean -0.6, s 0.5477, low -1.28
        ((-1.5, 1.5, -1.5, 1.5, 0.0), NO_WORSE),  # mean 0, s 1.5, low -1.862
        ((-3.0, 3.0, 0.0, 0.0, 0.0), NOT_SHOWN),  # mean 0, s 2.1213, low -2.63
        ((-2.1, -2.1, -2.1, -2.1, -2.1), NOT_SHOWN),  # surely worse
    ],
)
def test_no_worse_needs_the_lower_end_above_two_points_less(points, conclusion):
    rows = table("grpo", {SYNC: [0.8] * 5, PLAIN: [0.8 + p / 100 for p in points]})
    assert compare(rows, "grpo", PLAIN).conclusion == conclusion


def test_a_pair_that_lacks_its_other_half_is_left_out():
    rows = table("dapo", {SYNC: [0.8, 0.8], PLAIN: [0.7]})
    found = compare(rows, "dapo", PLAIN)
    assert found.seeds == (0,) and found.num_planned == 3 and found.interval is None
    assert compare(rows[1:], "dapo", PLAIN).seeds == (), "seed 0 lacks its synchronous run"
    assert compare(rows, "gspo", PLAIN).seeds == ()


def test_at_equal_time_the_slower_one_is_taken_where_the_faster_one_ended():
    # From 0.1 in a straight line: the synchronous run reaches 0.9 in 100 s, so it has 0.74 after 80 s.
    sync, april = (main_cell("grpo", name, 0) for name in (SYNC, PLAIN))
    rows = [row(sync, 0.9, cpu_s=100.0), row(april, 0.8, cpu_s=80.0)]
    assert compare(rows, "grpo", PLAIN).points == pytest.approx((-10.0,))
    assert compare(rows, "grpo", PLAIN, at="time").points == pytest.approx((6.0,))
    slower = [row(sync, 0.9, cpu_s=80.0), row(april, 0.9, cpu_s=100.0)]
    assert compare(slower, "grpo", PLAIN, at="time").points == pytest.approx((-16.0,))


def test_behind_is_in_rollouts_and_favours_neither():
    """Rows rise in a straight line over 40 rollouts from 0.1; accuracies are known at 20 and at 40."""
    rows = table("dapo", {SYNC: [0.5, 0.5, 0.5], PLAIN: [0.3, 0.5, 0.5]})
    # 0.2 and 0.3 come at 10 and 20 of synchronous, so 10 and 20 late; the other way round 0.3 comes at 40, so 20 early,
    # and 0.5 never, which counts as the end, so 0 early
    assert behind(rows, "dapo", PLAIN).mean == pytest.approx((15 + 10) / 2 / 3)
    assert behind(rows, "dapo", SYNC, PLAIN).mean == pytest.approx(-(15 + 10) / 2 / 3)
    assert behind(rows[:1] + rows[3:4], "dapo", PLAIN) is None
    assert "| +4.2 (" in make_report(rows).text


def test_where_a_curve_has_an_accuracy():
    curve = row(main_cell("grpo", SYNC, 0), 0.5).accuracy_curve  # 0.1, 0.3 and 0.5 at 0, 2560 and 5120 samples
    found = [samples_at(curve, accuracy) for accuracy in (0.0, 0.1, 0.2, 0.4, 0.5, 0.6)]
    assert found == pytest.approx([0, 0, 1280, 3840, 5120, 5120])


def test_times_of_two_machines_are_not_compared():
    rows = table("dapo", {SYNC: [0.8] * 3, PLAIN: [0.8] * 3})
    rows[-1] = dataclasses.replace(rows[-1], machine="64 cores, another processor")
    assert compare(rows, "dapo", PLAIN).seeds == (0, 1, 2)
    at_time = compare(rows, "dapo", PLAIN, at="time")
    assert at_time.seeds == (0, 1) and at_time.conclusion == NOT_SHOWN
    assert "| 3 of 3; at equal time 2 |" in make_report(rows).text


def test_times_of_a_crowded_machine_are_not_compared():
    rows = table("dapo", {SYNC: [0.8] * 3, PLAIN: [0.8] * 3})
    rows[0] = dataclasses.replace(rows[0], wall_s=1.21 * rows[0].cpu_s)
    assert compare(rows, "dapo", PLAIN).seeds == (0, 1, 2)
    assert compare(rows, "dapo", PLAIN, at="time").seeds == (1, 2)
    text = make_report(rows).text
    assert "at most 1.21). In 1 runs of the comparison it was above 1.2;" in text
    assert "| 3 of 3; at equal time 2 |" in text


def test_a_curve_is_linear_between_its_points_and_flat_outside():
    curve = row(main_cell("grpo", SYNC, 0), 0.5).accuracy_curve  # 0.1 at 0 s, 0.3 at 50 s, 0.5 at 100 s
    assert [accuracy_at(curve, s) for s in (-1, 0, 25, 50, 75, 100, 999)] == pytest.approx(
        [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    )
    assert accuracy_at(curve, 128 * 10, "samples") == pytest.approx(0.2)


def test_a_band_ends_with_the_shortest_run_and_needs_three_seeds():
    cells = [main_cell("grpo", SYNC, seed) for seed in range(3)]
    rows = [row(cell, 0.5, cpu_s=s) for cell, s in zip(cells, (100.0, 80.0, 100.0), strict=True)]
    band = band_of(rows, "cpu_s")
    assert band.positions[-1] == 80.0 and band.mean[-1] == pytest.approx((0.42 + 0.5 + 0.42) / 3)
    half = 4.3027 * (0.08 / 3**0.5) / 3**0.5  # of 0.42, 0.5, 0.42: s = 0.08 / sqrt(3)
    assert band.high[-1] - band.mean[-1] == pytest.approx(half, abs=1e-4)
    assert band_of(rows[:2], "cpu_s").low is None


def test_the_exact_evaluation_ends_the_curve():
    assert row(main_cell("grpo", SYNC, 0), 0.5).accuracy_curve[-1].num_judged == 2000


def test_the_last_gain_is_since_the_evaluation_before():
    run = row(main_cell("grpo", SYNC, 0), 0.5)  # 0.3 half-way
    assert last_gain(run) == pytest.approx(20.0)
