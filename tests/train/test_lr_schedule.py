"""The learning-rate schedule, by hand."""

import pytest

from rlpost.train.lr_schedule import lr_at


def rates(schedule, **changes):
    settings = {"peak": 1.0, "schedule": schedule, "warmup_steps": 2, "total_steps": 6, "final_share": 0.2} | changes
    return [lr_at(step, **settings) for step in range(9)]


def test_constant():
    assert rates("constant") == [0.5] + [1.0] * 8
    assert rates("constant", warmup_steps=0) == [1.0] * 9


def test_linear():
    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine():
    """At a quarter, half and three quarters: 0.2 + 0.8 (1 + cos) / 2 = 0.882843, 0.6, 0.317157."""
    expected = [0.5, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2, 0.2]
    assert rates("cosine") == pytest.approx(expected)


def test_warmup_longer_than_the_run():
    assert rates("cosine", warmup_steps=10, total_steps=6)[:3] == pytest.approx([0.1, 0.2, 0.3])
