"""Workers that are lost at awkward moments of keeping and recovery: no finished step is made again for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlpost.config import Config
from rlpost.errors import ShardsLost, WorkerLost
from rlpost.workers.cluster.workers import ClusterWorkers
from tests.workers.cluster.bare import settings_of


class Actors:
    """Stands for ``cluster.actors.Actors``: a worker is lost in the call of the method that ``dies_in`` names."""

    world, nodes = 2, ["a", "a"]

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lost: dict[int, str] = {}
        self.kept: set[int] = set()
        self.dies_in = ""

    def start(self) -> None:
        self.lost = {}
        self.call("start")

    def kill_all(self) -> None:
        pass

    def call(self, method: str, *arguments: Any, **_: Any) -> list[Any]:
        self.calls.append(method)
        if method == self.dies_in:
            self.dies_in = ""
            self.lost[1] = f"worker 1 died in {method}"
        if self.lost:
            raise WorkerLost("; ".join(self.lost.values()))
        if method == "keep":
            self.kept.add(arguments[0])
        if method == "drop_kept":
            self.kept = {step for step in self.kept if step >= arguments[0]}
        answer = {"kept_steps": sorted(self.kept), "can_keep": True, "kept_folder": Path("kept")}.get(method)
        return [answer, answer]


@pytest.fixture
def actors() -> Actors:
    return Actors()


@pytest.fixture
def workers(actors: Actors) -> ClusterWorkers:
    cfg = Config()
    cfg.cluster.kind, cfg.cluster.num_workers, cfg.engine.max_slots = "ray", 2, 4
    workers = ClusterWorkers(None, actors, settings_of(cfg), scratch=Path("scratch"), say=lambda _: None)  # type: ignore[arg-type]
    workers.start()
    workers.keep(0)
    return workers


def test_a_worker_lost_while_older_states_are_dropped_costs_no_step(workers: ClusterWorkers, actors: Actors) -> None:
    actors.dies_in = "drop_kept"
    workers.keep(1)
    assert workers.losses(), "the loss is told, the step is safe"
    workers.recover(1)
    assert not workers.losses() and actors.calls[-1] == "load_kept"


def test_a_worker_lost_while_the_state_is_kept_leaves_the_one_before(workers: ClusterWorkers, actors: Actors) -> None:
    actors.dies_in = "keep"
    with pytest.raises(WorkerLost):
        workers.keep(1)
    workers.recover(0)
    assert actors.kept == {0}


@pytest.mark.parametrize("moment", ["start", "kept_steps", "load_kept", "begin_training"])
def test_the_trainer_s_turn_is_remembered_through_a_second_loss(
    workers: ClusterWorkers, actors: Actors, moment: str
) -> None:
    with workers.device.training():
        pass
    actors.dies_in = moment
    with pytest.raises(WorkerLost):
        workers.recover(0)
    workers.recover(0)
    assert workers.device.turn == "trainer" and actors.calls[-2:] == ["load_kept", "begin_training"]


def test_a_state_that_no_worker_left_sends_the_run_back(workers: ClusterWorkers, actors: Actors) -> None:
    with pytest.raises(ShardsLost):
        workers.recover(1)
    actors.kept.clear()  # with the machine it was on
    with pytest.raises(ShardsLost):
        workers.recover(0)


def test_a_worker_that_dies_while_the_run_starts_is_replaced(workers: ClusterWorkers, actors: Actors) -> None:
    said: list[str] = []
    workers._say = said.append
    actors.dies_in = "can_keep"
    workers.start()
    assert said == ["worker 1 died in can_keep; restarting all workers"] and actors.calls.count("start") == 3
