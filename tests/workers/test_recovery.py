"""Workers are lost and come back: what was asked is repeated, within limits, and never on weights that are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlpost.errors import RunError, ShardsLost, WorkerLost
from rlpost.reporting.waterfall import Stopwatch
from rlpost.workers.recovery import RecoveringWorkers


class Cluster:
    """Stands for workers: ``lost`` are those known to be lost, ``starts`` what each new start comes to; ``did`` says in
    order what was asked of them."""

    trainer = "trainer"

    class engine:  # noqa: N801
        max_slots = 4

    def __init__(self, *starts: Exception | None) -> None:
        self.lost: list[str] = []
        self.starts = list(starts)
        self.recovered: list[int] = []
        self.kept: list[int] = []
        self.did: list[str] = []
        self.device = self

    def losses(self) -> list[str]:
        return self.lost

    def recover(self, step: int) -> None:
        self.recovered.append(step)
        error = self.starts.pop(0) if self.starts else None
        if error is not None:
            raise error
        self.lost = []

    def keep(self, step: int) -> None:
        self.kept.append(step)

    def publish_weights(self, policy_version: int) -> str:
        self.did.append(f"publish {policy_version}")
        return f"publication {policy_version}"

    @contextmanager
    def training(self) -> Iterator[None]:
        self.did.append("training")
        yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        self.did.append("generating")
        yield


def workers_on(cluster: Cluster, *, limit: int = 3, step: int = 0) -> tuple[RecoveringWorkers, list[str]]:
    said: list[str] = []
    workers = RecoveringWorkers(cluster, limit=limit, begin=said.append, say=said.append, timed=Stopwatch().part)  # type: ignore[arg-type]
    workers.step = step
    return workers, said


def failing(*errors: Exception | None) -> Callable[[Any], str]:
    outcomes = list(errors)

    def call(part: Any) -> str:
        error = outcomes.pop(0) if outcomes else None
        if error is not None:
            raise error
        return f"done with the {part}"

    return call


def test_a_call_in_which_a_worker_is_lost_is_repeated_with_fresh_ones() -> None:
    cluster = Cluster()
    workers, said = workers_on(cluster, step=7)
    assert workers.with_trainer(failing(WorkerLost("worker 1 died"))) == "done with the trainer"
    assert cluster.recovered == [7] and cluster.did == ["training", "training"]
    assert said[:2] == ["recover", "worker 1 died; restarting all workers"]


def test_workers_lost_before_the_call_are_replaced_before_it() -> None:
    cluster = Cluster()
    cluster.lost = ["worker 0 died"]
    workers, said = workers_on(cluster, step=2)
    seen: list[list[str]] = []
    workers.with_trainer(lambda trainer: seen.append(cluster.losses()))
    assert seen == [[]] and cluster.recovered == [2] and "worker 0 died" in said[1]


def test_a_worker_lost_while_the_others_start_begins_the_start_again() -> None:
    cluster = Cluster(WorkerLost("worker 0 died in phase 'start'"), None)
    workers, said = workers_on(cluster, step=1)
    assert workers.with_trainer(failing(WorkerLost("worker 1 died"))) == "done with the trainer"
    assert cluster.recovered == [1, 1] and said.count("recover") == 2


def test_weights_are_published_again_after_a_recovery_and_only_then() -> None:
    cluster = Cluster()
    workers, _ = workers_on(cluster, step=4)
    assert workers.publish() == "publication 4"
    with workers.generating() as engine:
        assert engine is cluster.engine
    workers.with_engine(failing(WorkerLost("w")))  # fresh engines have no weights
    assert cluster.did == ["publish 4", "generating", "publish 4"] and cluster.recovered == [4]


def test_an_update_is_repeated_from_the_state_before_it_and_its_outcome_kept() -> None:
    cluster = Cluster()
    workers, said = workers_on(cluster, step=4)
    workers.publish()
    assert workers.update(failing(WorkerLost("w"))) == "done with the trainer"
    assert cluster.recovered == [4] and cluster.kept == [5] and said.count("update") == 2
    workers.step_done()
    with workers.generating():  # the update changed the weights: nobody may generate with those before it
        pass
    assert cluster.did[-2:] == ["publish 5", "generating"]


def test_a_call_that_ends_with_every_engine_lost_is_repeated() -> None:
    cluster = Cluster()
    workers, _ = workers_on(cluster, step=3)

    class Slots:
        max_slots = 0

    cluster.engine = Slots()  # type: ignore[misc, assignment]
    cluster.lost = []

    def call(engine: Any) -> str:
        if cluster.recovered:
            engine.max_slots = 4
        return f"{engine.max_slots} slots"

    assert workers.with_engine(call) == "4 slots" and cluster.recovered == [3]


def test_losses_are_limited_within_a_step() -> None:
    cluster = Cluster()
    workers, _ = workers_on(cluster, limit=2, step=3)
    for _ in range(2):
        workers.with_trainer(failing(WorkerLost("w"), WorkerLost("w")))
        workers.step_done()
    with pytest.raises(RunError, match="workers lost within one step.*3 times.*<= 2"):
        workers.with_trainer(failing(*[WorkerLost("w")] * 3))
    assert len(cluster.recovered) == 6


def test_a_state_that_is_gone_is_not_survived_here() -> None:
    workers, _ = workers_on(Cluster(ShardsLost("gone")))
    with pytest.raises(ShardsLost):
        workers.with_trainer(failing(WorkerLost("w")))


def test_other_errors_pass_through() -> None:
    cluster = Cluster()
    workers, _ = workers_on(cluster)
    with pytest.raises(ZeroDivisionError):
        workers.with_trainer(failing(ZeroDivisionError()))
    assert not cluster.recovered
