"""Workers are lost and come back: the phase is made again, within limits, and never on weights that are gone."""

from __future__ import annotations

import pytest

from rlpost.errors import RunError, ShardsLost, WorkerLost
from rlpost.reporting.waterfall import Stopwatch
from rlpost.workers.recovery import Recovery


class Workers:
    """Stands for a cluster: ``lost`` are those known to be lost, ``starts`` what each new start comes to."""

    def __init__(self, *starts: Exception | None) -> None:
        self.lost: list[str] = []
        self.starts = list(starts)
        self.recovered: list[int] = []

    def losses(self) -> list[str]:
        return self.lost

    def recover(self, step: int) -> None:
        self.recovered.append(step)
        error = self.starts.pop(0) if self.starts else None
        if error is not None:
            raise error
        self.lost = []


def recovery_of(workers: Workers, limit: int = 3) -> tuple[Recovery, list[str]]:
    said: list[str] = []
    recovery = Recovery(workers, limit=limit, begin=said.append, say=said.append, timed=Stopwatch().part)  # type: ignore[arg-type]
    return recovery, said


def failing(*errors: Exception | None):  # type: ignore[no-untyped-def]
    outcomes = list(errors)

    def call() -> str:
        error = outcomes.pop(0) if outcomes else None
        if error is not None:
            raise error
        return "done"

    return call


def test_a_phase_in_which_a_worker_is_lost_is_made_again_with_fresh_ones() -> None:
    workers = Workers()
    recovery, said = recovery_of(workers)
    recovery.is_published = True
    assert recovery.surviving(7, failing(WorkerLost("worker 1 died"))) == "done"
    assert workers.recovered == [7] and not recovery.is_published
    assert said[:2] == ["recover", "worker 1 died; workers are started anew"]


def test_workers_lost_before_the_phase_are_replaced_before_it() -> None:
    workers = Workers()
    workers.lost = ["worker 0 died"]
    recovery, said = recovery_of(workers)
    seen: list[list[str]] = []
    recovery.surviving(2, lambda: seen.append(workers.losses()))
    assert seen == [[]] and workers.recovered == [2] and "worker 0 died" in said[1]


def test_a_worker_lost_while_the_others_start_begins_the_start_again() -> None:
    workers = Workers(WorkerLost("worker 0 died in phase 'start'"), None)
    recovery, said = recovery_of(workers)
    assert recovery.surviving(1, failing(WorkerLost("worker 1 died"))) == "done"
    assert workers.recovered == [1, 1] and any("in phase 'start'" in line for line in said)


def test_too_many_losses_within_one_step_end_the_run_and_a_finished_step_begins_the_count_again() -> None:
    workers = Workers()
    recovery, _ = recovery_of(workers, limit=2)
    for _ in range(2):
        recovery.surviving(3, failing(WorkerLost("w"), WorkerLost("w")))
        recovery.step_done()
    with pytest.raises(RunError, match="workers lost within one step.*3 times.*<= 2"):
        recovery.surviving(5, failing(*[WorkerLost("w")] * 3))
    assert len(workers.recovered) == 6


def test_a_state_that_is_gone_is_not_survived_here() -> None:
    recovery, _ = recovery_of(Workers(ShardsLost("gone")))
    with pytest.raises(ShardsLost):
        recovery.surviving(3, failing(WorkerLost("w")))


def test_other_errors_pass_through() -> None:
    workers = Workers()
    recovery, _ = recovery_of(workers)
    with pytest.raises(ZeroDivisionError):
        recovery.surviving(0, failing(ZeroDivisionError()))
    assert not workers.recovered
