"""One test that is interrupted stays one failure: the next life is answered for by itself."""

from __future__ import annotations

import signal
import time

import pytest

from .lives import Nursery


class Interrupted(BaseException):
    """What a time limit raises in the middle of a test."""


@pytest.fixture
def interrupt():
    def raise_it(number, frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, raise_it)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_life_that_is_given_up_leaves_no_answer_behind(tmp_path, interrupt):
    with Nursery(tmp_path, ready=False) as nursery:
        assert nursery.live("--version").status == 0
        interrupt(1.0)
        with pytest.raises(Interrupted):
            nursery.run("sleep", "60")
        started = time.monotonic()
        assert nursery.live("nosuch").status == 2, "the answer is another order's"
        assert nursery.live("--version").status == 0
        assert time.monotonic() - started < 50, "somebody waited for the life that was given up"
