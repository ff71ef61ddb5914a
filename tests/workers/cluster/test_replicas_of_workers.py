"""Engines of several workers as replicas: who is called, and what is reported when a member answers, errs or dies.

The actors are played: an answer comes when the test says so. Real ones are in ``tests/e2e/test_tensor_parallel.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlpost.engine.protocol import Iterations
from rlpost.engine.replicas import GATHER_FROM, Exchange, Loss, Report, gather_s
from rlpost.errors import RunError, WorkerLost
from rlpost.workers.cluster.workers import RayReplicas
from rlpost.workers.engine_map import EngineMap

NOTHING = Exchange(requests=[])


@dataclass(eq=False)
class Ref:
    """A call under way; ready once it has an answer."""

    rank: int
    method: str
    answer: Any = None


@dataclass
class Method:
    actors: PlayedActors
    rank: int
    name: str

    def remote(self, *arguments: Any) -> Ref:
        ref = Ref(self.rank, self.name)
        self.actors.calls.append(ref)
        return ref


@dataclass
class Handle:
    actors: PlayedActors
    rank: int

    def __getattr__(self, name: str) -> Method:
        return Method(self.actors, self.rank, name)


@dataclass
class PlayedActors:
    """What ``RayReplicas`` needs of ``cluster.actors.Actors``."""

    world: int
    calls: list[Ref] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    killed: list[int] = field(default_factory=list)
    answers_by_itself: dict[int, Any] = field(default_factory=dict)  # rank: to whatever it is asked
    gathered_s: list[float] = field(default_factory=list)  # of each wait
    doing: str = ""

    def __post_init__(self) -> None:
        self.handles = [Handle(self, rank) for rank in range(self.world)]

    def wait(self, refs: Sequence[Ref], deadline: float = math.inf, *, gather_s: float = 0.0) -> list[Ref]:
        self.gathered_s.append(gather_s)
        for ref in refs:
            ref.answer = ref.answer or self.answers_by_itself.get(ref.rank)
        ready = [ref for ref in refs if ref.answer is not None]
        assert ready or deadline < math.inf, "this would wait for ever"
        return ready

    def result(self, rank: int, ref: Ref) -> Any:
        assert rank == ref.rank
        if isinstance(ref.answer, WorkerLost):
            self.lose(rank)
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def lose(self, rank: int) -> str:
        return self.lost.setdefault(rank, f"worker {rank} died")

    def name(self, rank: int) -> str:
        return f"worker {rank}"

    def kill(self, rank: int, reason: str) -> None:
        self.lost.setdefault(rank, reason)
        self.killed.append(rank)

    def answer(self, rank: int, method: str, answer: Any) -> None:
        next(c for c in self.calls if c.rank == rank and c.method == method and c.answer is None).answer = answer

    def asked(self) -> list[tuple[int, str]]:
        return [(c.rank, c.method) for c in self.calls]


def report(replica: int) -> Report:
    return Report(replica=replica, ended=(), running=None, iterations=Iterations())


@pytest.fixture
def actors() -> PlayedActors:
    return PlayedActors(world=4)


@pytest.fixture
def replicas(actors: PlayedActors) -> RayReplicas:
    engines = EngineMap(num_workers=4, tensor_parallel=2)
    return RayReplicas(actors, engines, slots=8, exchange_s=1.0, abort_timeout_s=0.05)  # type: ignore[arg-type]


def test_many_engines_are_given_time_to_report_together_and_no_stop_waits_for_it() -> None:
    for world in (GATHER_FROM - 1, GATHER_FROM):
        actors = PlayedActors(world=world, answers_by_itself={0: report(0)})
        engines = EngineMap(num_workers=world, tensor_parallel=1)
        replicas = RayReplicas(actors, engines, slots=8, exchange_s=2.0, abort_timeout_s=1.0)  # type: ignore[arg-type]
        replicas.send([(0, NOTHING)])
        replicas.wait()
        replicas.stop([0])
        assert actors.gathered_s == [gather_s(world, 2.0), 0.0]
        assert (gather_s(world, 2.0) > 0) == (world == GATHER_FROM)


def test_the_leader_is_asked_and_the_others_follow_call_by_call(actors: PlayedActors, replicas: RayReplicas) -> None:
    assert list(replicas.slots) == [8, 8]
    replicas.send([(1, NOTHING)])
    assert actors.asked() == [(2, "exchange"), (3, "follow")]
    actors.answer(3, "follow", "done")
    actors.answer(2, "exchange", report(1))
    assert replicas.wait() == [report(1)]
    replicas.send([(0, NOTHING)])
    actors.calls.clear()
    actors.answers_by_itself = {0: report(0), 1: "done"}
    assert replicas.stop([0]) == [report(0), report(0)]
    assert actors.asked() == [(0, "halt"), (0, "stop"), (1, "follow")]


def test_an_engine_that_loses_a_follower_is_lost_and_its_leader_is_ended(
    actors: PlayedActors, replicas: RayReplicas
) -> None:
    for n in (0, 1):
        replicas.send([(n, NOTHING)])
    actors.answer(1, "follow", WorkerLost("gone"))
    (loss,) = replicas.wait()
    assert isinstance(loss, Loss) and (loss.replica, loss.reason) == (0, "worker 1 died")
    assert actors.killed == [0] and sorted(actors.lost) == [0, 1]
    actors.answer(0, "exchange", WorkerLost("killed"))  # comes in later, and says nothing new
    actors.answer(2, "exchange", report(1))
    assert replicas.wait() == [report(1)]


def test_a_lost_leader_and_its_follower_that_erred_for_it_are_one_loss(
    actors: PlayedActors, replicas: RayReplicas
) -> None:
    replicas.send([(0, NOTHING)])
    replicas.send([(0, NOTHING)])
    actors.answer(0, "exchange", WorkerLost("gone"))
    actors.answer(1, "follow", WorkerLost("its connection closed"))
    reports = replicas.wait()
    assert {r.replica for r in reports} == {0} and all(isinstance(r, Loss) for r in reports)
    assert set(actors.lost) == {0, 1}
    assert not replicas._under_way[0]


def test_what_a_follower_raises_reaches_the_run_while_the_leader_still_waits(
    actors: PlayedActors, replicas: RayReplicas
) -> None:
    replicas.send([(0, NOTHING)])
    actors.answer(1, "follow", RunError("members of one engine: requests in flight of worker 1 ..."))
    with pytest.raises(RunError, match="members of one engine"):
        replicas.wait()


def test_an_engine_that_does_not_stop_in_time_is_killed_with_all_its_members(
    actors: PlayedActors, replicas: RayReplicas
) -> None:
    for n in (0, 1):
        replicas.send([(n, NOTHING)])
    actors.answers_by_itself = {2: report(1)}
    reports = replicas.stop([0, 1])
    assert [r for r in reports if isinstance(r, Report)] == [report(1), report(1)]
    (loss,) = [r for r in reports if isinstance(r, Loss)]
    assert loss.replica == 0 and "worker 0 did not end its requests within 0.05 s" in loss.reason
    assert actors.killed == [0, 1]
