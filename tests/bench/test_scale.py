"""The controller's cost with more replicas, in short: it grows with samples and exchanges, and with nothing else.

No times are asserted but their ratio between two sizes; the curve to 1,024 replicas is ``benchmarks/scale.py``.
"""

import sys

import pytest

from rlpost.bench import scale
from rlpost.bench.scale import EXCHANGE_S, MEAN_TOKENS, Load, length_table


def count_calls(load):
    """Calls of Python functions in the project's own code, over the whole run, and the measured steps' point."""
    calls = 0

    def on_event(frame, event, argument):
        nonlocal calls
        if event == "call" and "rlpost" in frame.f_code.co_filename:
            calls += 1

    sys.setprofile(on_event)
    try:
        return scale.run(load), calls
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def small_and_large():
    return [count_calls(Load(replicas=r, slots=16, warm_up=1, steps=1)) for r in (16, 128)]


def test_work_per_sample_stays_flat_with_eight_times_the_replicas(small_and_large):
    """Counted, not timed: what is looked at once for each open group and exchange would show here eightfold."""
    (small, small_calls), (large, large_calls) = small_and_large
    assert large.samples == 8 * small.samples
    assert large_calls / large.samples < 1.15 * small_calls / small.samples


def test_nothing_is_done_for_each_token(small_and_large):
    for point, calls in small_and_large:
        assert point.tokens > 5_000 * point.samples, "responses are too short to tell"
        assert calls < 0.3 * point.tokens, "functions are called for each token"


def test_replicas_report_once_in_an_exchange_and_stay_full(small_and_large):
    for point, _ in small_and_large:
        whole = point.replicas * point.virtual_s / EXCHANGE_S
        assert point.reports < 1.1 * whole + 10 * point.replicas
        assert point.idle_share < 0.06


def test_the_lengths_have_the_mean_they_are_named_for():
    assert length_table().mean() == pytest.approx(MEAN_TOKENS, rel=0.01)
