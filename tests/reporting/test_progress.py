"""The progress display, on a terminal and elsewhere, and the estimate of the time left."""

from __future__ import annotations

import io
import os
import pty
import re
import time

import pytest

from rlpost.evaluation.intervals import Interval
from rlpost.reporting.progress import Pace, Progress, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_run(progress: Progress, clock: Clock) -> None:
    progress.start(3, evals_left=2)
    progress.phase("eval")
    clock.now += 4
    progress.evaluation(Interval(mean=0.5, low=0.45, high=0.55), {})
    for step in (1, 2, 3):
        progress.phase("generate")
        progress.rollout(4, 8, running=16, open_groups=10)
        clock.now += 10
        progress.phase("update")
        if step == 3:
            progress.phase("eval")
            clock.now += 4
        progress.step_done(step, {"reward/mean": step / 10, "rollout/carried_share": 0.25, "time/step": 10.0})
    progress.evaluation(Interval(mean=0.9, low=0.88, high=0.92), {"hard": Interval(mean=0.8, low=0.7, high=0.9)})
    progress.message("saved [model]")
    progress.close()


def test_off_a_terminal_there_is_one_line_a_step() -> None:
    out, clock = io.StringIO(), Clock()
    a_run(Progress("auto", out=out, clock=clock), clock)
    assert out.getvalue().splitlines() == [
        "evaluation after step 0: accuracy 50.0 % (45.0 to 55.0)",
        "step 1/3  reward 0.100  25% carried over  10.0 s  24 s left",
        "step 2/3  reward 0.200  25% carried over  10.0 s  14 s left",
        "step 3/3  reward 0.300  25% carried over  10.0 s  0 s left",
        "evaluation after step 3: accuracy 90.0 % (88.0 to 92.0)",
        "  hard: 80.0 % (70.0 to 90.0)",
        "saved [model]",
    ]


def test_quiet_prints_messages_only() -> None:
    out, clock = io.StringIO(), Clock()
    a_run(Progress("quiet", out=out, clock=clock), clock)
    assert out.getvalue() == "saved [model]\n"


def test_a_metric_that_is_missing_or_null_is_left_out_of_the_line() -> None:
    out = io.StringIO()
    progress = Progress("lines", out=out, clock=Clock())
    progress.start(1)
    progress.step_done(1, {"reward/mean": None, "time/step": 2.0})  # type: ignore[dict-item]
    assert out.getvalue() == "step 1/1  2.0 s  0 s left\n"


def test_on_a_terminal_the_block_shows_phase_groups_accuracy_and_time_left() -> None:
    main, side = pty.openpty()
    with open(side, "w") as terminal:
        os.set_blocking(main, False)
        clock = Clock()
        with Progress("auto", out=terminal, clock=clock) as progress:
            progress.start(5, evals_left=1)
            progress.evaluation(Interval(mean=0.5, low=0.45, high=0.55), {})
            progress.phase("generate")
            clock.now += 70
            progress.step_done(1, {"reward/mean": 0.4})
            progress.phase("generate")
            progress.rollout(4, 8, running=16, open_groups=10)
            progress.message("a line that stays [1]")
            deadline = time.monotonic() + 5
            screen = ""
            while "groups open" not in screen and time.monotonic() < deadline:
                time.sleep(0.05)
                screen += read(main)
        screen += read(main)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "a line that stays [1]" in plain
    assert "step 2 of 5: generating" in plain
    assert "████████████░░░░░░░░░░░░ 4/8 groups  16 samples running, 10 groups open" in plain
    assert "accuracy 50.0 % (45.0 to 55.0)" in plain and "reward 0.400" in plain
    assert "about 4 min 40 s left" in plain
    os.close(main)


def read(descriptor: int) -> str:
    try:
        return os.read(descriptor, 1 << 20).decode(errors="replace")
    except BlockingIOError:
        return ""


def test_calls_cost_next_to_nothing_beside_an_engine_step() -> None:
    main, side = pty.openpty()
    with open(side, "w") as terminal, Progress("live", out=terminal) as progress:
        started = time.perf_counter()
        for admitted in range(10_000):
            progress.rollout(admitted, 10_000, running=1)
        per_call = (time.perf_counter() - started) / 10_000
    os.close(main)
    assert per_call < 200e-6  # an engine step is 10 ms; measured 1 us on an idle machine


def test_time_left_comes_from_medians_with_evaluations_apart() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(10, 3)
    assert pace.left_s() is None
    for lap in (100.0, 2.0, 3.0):  # the first step warms up
        clock.now += lap
        pace.step_done()
    pace.phase("eval")
    clock.now += 7.0
    pace.phase("generate")
    assert pace.left_s() == 3.0 * 7 + 7.0 * 2
    clock.now += 1.5
    assert pace.left_s() == 3.0 * 7 + 7.0 * 2 - 1.5


def test_an_evaluation_inside_a_step_does_not_lengthen_it() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(3, 2)
    pace.phase("generate")
    clock.now += 5.0
    pace.phase("eval")
    clock.now += 20.0
    pace.step_done()
    assert pace.left_s() == 5.0 * 2 + 20.0


def test_time_left_is_never_negative_and_ends_at_zero() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(2, 0)
    clock.now += 1.0
    pace.step_done()
    clock.now += 50.0
    assert pace.left_s() == 0.0
    pace.step_done()
    assert pace.left_s() == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (65, "1 min 05 s"), (3599, "59 min 59 s"), (7810, "2 h 10 min")],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words
