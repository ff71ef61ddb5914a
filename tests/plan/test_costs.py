"""The update's line through recorded steps, by hand, and how a ratio is chosen."""

from dataclasses import replace

import pytest

from rlpost.plan.costs import Costs, fit_update
from rlpost.plan.predict import Row, _choose
from rlpost.plan.recording import RecordedStep

STEP = RecordedStep(
    step=1, tokens=0, generate_s=0, update_s=0, publish_s=0, other_s=0, idle_share=0, slots=1, iterations=[]
)


def steps(*points):
    return [replace(STEP, tokens=tokens, update_s=seconds) for tokens, seconds in points]


def test_a_line_through_steps_of_different_size():
    fit = fit_update(steps((1000, 0.7), (2000, 0.9), (4000, 1.3)), ranks=2)  # 0.5 + 0.0002 a token, 0.0004 on a rank
    assert (fit.update_s, fit.update_token_s) == (pytest.approx(0.5), pytest.approx(0.0004)) and not fit.is_proportional


def test_one_slow_step_does_not_move_the_line():
    fit = fit_update(steps((1000, 0.7), (1500, 0.8), (2000, 0.9), (3000, 1.1), (4000, 30.0)), ranks=1)
    assert (fit.update_s, fit.update_token_s) == (pytest.approx(0.5), pytest.approx(0.0002))


def test_steps_of_the_same_size_show_no_fixed_part():
    fit = fit_update(steps((1000, 0.6), (1100, 0.65), (1050, 0.2)), ranks=1)
    assert fit.is_proportional and fit.update_s == 0 and fit.update_token_s == pytest.approx(0.65 / 1100)


def test_neither_part_is_negative():
    falling = fit_update(steps((1000, 0.9), (2000, 0.8), (4000, 0.6)), ranks=1)
    assert falling.update_token_s == 0 and falling.update_s == pytest.approx(0.8)
    steep = fit_update(steps((1000, 0.1), (2000, 0.5), (4000, 1.3)), ranks=1)
    assert steep.is_proportional and steep.update_s == 0


def test_an_updates_tokens_are_divided_and_its_fixed_part_is_not():
    costs = Costs(
        iteration_s=0, sample_s=0, prefill_s=0, rollout_s=0, update_s=0.5, update_token_s=0.001, reduce_s=0.25,
        publish_s=0, other_s=0, prompt_tokens=1,
    )  # fmt: skip
    assert costs.update(1000, ranks=1) == pytest.approx(1.75) and costs.update(1000, ranks=4) == pytest.approx(1.0)


ROW = Row(
    oversample=1.0, step_s=1, generate_s=1, update_s=0, publish_s=0, other_s=0, idle_share=0.4, carried_share=0.0,
    trained_tokens_per_s=50.0,
)  # fmt: skip


def rows(*rates):
    return [replace(ROW, oversample=float(n), trained_tokens_per_s=rate) for n, rate in enumerate(rates, 1)]


def test_the_smallest_ratio_within_a_hundredth_of_the_fastest_is_best():
    best, reason = _choose(rows(50, 99.5, 100, 98), [rows(50, 99.5, 100, 98), rows(50, 90, 100, 98)])
    assert best == 2.0
    assert "best in 1 of 2 repeats" in reason and "3.0 is 0.5% faster" in reason
    assert "99% more than synchronous" in reason
    assert _choose(rows(50, 98, 100), [])[0] == 3.0
