"""Members of one engine, each a thread: what the leader does all do, and a member that differs stops all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlpost.engine.lockstep import LockstepEngine
from rlpost.engine.protocol import EngineStep, Request, SamplingSettings
from rlpost.engine.replicas import Exchange, ReplicaLoop
from rlpost.errors import RunError
from rlpost.simulation.engine import SimulatedEngine, StepCost

LIMIT = 40


class Table:
    """Where members meet: each lays down its part and takes all; one that leaves in anger breaks it for the others."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.parts: list[Any] = [None] * size

    def exchange(self, rank: int, part: Any) -> list[Any]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class Seat:
    """Implements ``Members``."""

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank = table, rank
        self.names: Sequence[str] = [f"worker {r}" for r in range(len(table.parts))]

    def gather(self, row: np.ndarray) -> np.ndarray:
        return np.stack(self.table.exchange(self.rank, row))

    def share(self, payload: bytes, num_bytes: int) -> bytes:
        data = self.table.exchange(self.rank, payload)[0]
        assert len(data) == num_bytes
        return bytes(data)


class Counted(SimulatedEngine):
    """Asks before it computes a batch, as the real one does."""

    agree: Callable[[np.ndarray], None]

    def step(self) -> EngineStep:
        self.agree(np.ones(len(self._running), np.int64))
        return super().step()


def simulated() -> Counted:
    return Counted(
        max_slots=4,
        length_of=lambda request_id: 3 + 7 * int(request_id),
        max_response_tokens=LIMIT,
        cost=StepCost(base_s=1.0, sample_s=0.0, prefill_s=0.0),
        max_jump=1,
    )


def members(size: int) -> list[LockstepEngine]:
    table = Table(size)
    engines = [simulated() for _ in range(size)]
    together = [LockstepEngine(engine, Seat(table, rank)) for rank, engine in enumerate(engines)]
    for engine, member in zip(engines, together, strict=True):
        engine.agree = member.agree_on_batch
    return together


def request(number: int) -> Request:
    prompt = np.arange(5, dtype=np.int32)
    return Request(request_id=str(number), parts=(prompt,), max_new_tokens=LIMIT, seed=1, sampling=SamplingSettings())


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returned or raised, all made at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def lead(engine: LockstepEngine, exchanges: Sequence[Sequence[int]], exchange_s: float = 6.0) -> list[Any]:
    """As the leader's worker does: exchanges, then a stop, each ended."""
    loop = ReplicaLoop(engine, replica=0, exchange_s=exchange_s, halted=lambda: False)
    reports = []
    for numbers in exchanges:
        reports.append(loop.run(Exchange(requests=[request(n) for n in numbers])))
        engine.end()
    reports.append(loop.stop())
    engine.end()
    return reports


def follow(engine: LockstepEngine, times: int) -> int:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    for _ in range(times):
        engine.follow(beat)
    return beats


@pytest.mark.parametrize("size", [2, 4])
def test_an_engine_of_many_members_reports_what_an_engine_of_one_does(size: int) -> None:
    engines = members(size)
    exchanges = [[0, 1, 2, 3, 4, 5], [6], []]
    leader, *others = together(
        [lambda: lead(engines[0], exchanges), *(lambda e=e: follow(e, 4) for e in engines[1:])]  # type: ignore[misc]
    )
    alone = simulated()
    alone.agree = lambda num_tokens: None
    loop = ReplicaLoop(alone, replica=0, exchange_s=6.0, halted=lambda: False)
    expected = [loop.run(Exchange(requests=[request(n) for n in numbers])) for numbers in exchanges]
    expected.append(loop.stop())
    for got, want in zip(leader, expected, strict=True):
        assert [(d.request_id, d.token_ids.tolist(), d.finish_reason) for d in got.ended] == [
            (d.request_id, d.token_ids.tolist(), d.finish_reason) for d in want.ended
        ]
        assert got.iterations == want.iterations
    assert len(set(others)) == 1 and others[0] > 20, "the others beat once for each command"
    assert [e._num_calls for e in engines] == [engines[0]._num_calls] * size
    assert [e._checksum for e in engines] == [engines[0]._checksum] * size
    assert all(e.num_in_flight == 0 for e in engines)


def stopped(engines: list[LockstepEngine], exchanges: Sequence[Sequence[int]] = ((0, 1, 2, 3),)) -> str:
    """The message with which all members stop; they must all have the same."""
    times = len(exchanges) + 1
    raised = together(
        [lambda: lead(engines[0], exchanges, 1000.0), *(lambda e=e: follow(e, times) for e in engines[1:])]
    )  # type: ignore[misc]
    assert {type(error) for error in raised} == {RunError}, raised
    assert len({str(error) for error in raised}) == 1
    return str(raised[0])


def test_a_member_that_drops_a_request_stops_all_before_a_batch_is_computed() -> None:
    engines = members(3)
    dropped = engines[2]._engine.submit
    engines[2]._engine.submit = lambda requests: dropped(requests[:-1])  # type: ignore[method-assign]
    message = stopped(engines)
    assert "requests in flight of worker 2, at engine step 0: got '3'; expected 4, as at worker 0" in message
    assert [e._engine.now() for e in engines] == [0.0] * 3, "a batch was computed"


def test_a_scheduler_that_differs_unseen_stops_all_before_that_batch_is_computed() -> None:
    engines = members(2)
    member = engines[1]._engine
    agree, batches = member.agree, []  # type: ignore[attr-defined]

    def one_fewer(num_tokens: np.ndarray) -> None:
        batches.append(len(num_tokens))
        agree(num_tokens[:-1] if len(batches) == 4 else num_tokens)

    member.agree = one_fewer  # type: ignore[attr-defined]
    message = stopped(engines)
    assert "samples in the batch of worker 1, at engine step 3: got '2'; expected 3, as at worker 0" in message
    assert [e._engine.now() for e in engines] == [3.0, 3.0], "the fourth batch was computed"


@pytest.mark.parametrize("at", [0, 5, "last"])
def test_a_member_that_samples_another_token_stops_all_at_once_also_in_the_last_step(at: Any) -> None:
    engines = members(2)
    member, step, steps = engines[1]._engine, engines[1]._engine.step, 0
    last = 23  # request 3 has 24 tokens

    def other_token() -> EngineStep:
        nonlocal steps
        result = step()
        if steps == (last if at == "last" else at):
            first = result.deltas[0]
            result = replace(result, deltas=[first._replace(token_ids=first.token_ids + 1), *result.deltas[1:]])
        steps += 1
        return result

    member.step = other_token  # type: ignore[method-assign]
    message = stopped(engines, [(3,)]) if at == "last" else stopped(engines)
    assert f"checksum of inputs and outputs of worker 1, at engine step {(last if at == 'last' else at) + 1}" in (
        message
    )


def test_a_member_that_aborts_alone_stops_all() -> None:
    engines = members(2)
    step, steps = engines[1]._engine.step, 0

    def aborts() -> EngineStep:
        nonlocal steps
        steps += 1
        result = step()
        if steps == 2:
            engines[1]._engine.abort_all()
        return result

    engines[1]._engine.step = aborts  # type: ignore[method-assign]
    assert "requests in flight of worker 1, at engine step 2: got '0'; expected 4" in stopped(engines)


def test_members_that_are_at_different_calls_stop_and_say_which() -> None:
    engines = members(2)
    raised = together([lambda: engines[0].score([np.arange(4)]), engines[1].sleep])
    assert all("call of worker 1, at engine step 0: got 'sleep'; expected score" in str(e) for e in raised), raised
    engines = members(2)
    raised = together([lambda: engines[0].submit([request(1)]), lambda: engines[1].score([np.arange(4)])])
    assert all("call of worker 1, at engine step 0: got 'score'; expected submit" in str(e) for e in raised), raised
    engines = members(2)
    raised = together([engines[0].sleep, lambda: engines[1].follow(lambda: None)])
    assert all("got 'follow'; expected sleep" in str(e) for e in raised), raised


def test_members_that_score_other_sequences_stop() -> None:
    engines = members(2)
    raised = together([lambda: engines[0].score([np.arange(4)]), lambda: engines[1].score([np.arange(1, 5)])])
    assert all("checksum" in str(error) for error in raised), raised


def test_calls_that_all_make_by_themselves_reach_every_engine() -> None:
    engines = members(2)
    for call in ("sleep", "wake"):
        assert together([getattr(e, call) for e in engines]) == [None, None]
    scores = together([lambda e=e: e.score([np.arange(6)]) for e in engines])  # type: ignore[misc]
    assert [len(s[0]) for s in scores] == [5, 5]
    assert together([lambda e=e: e.load_weights([[("a", 1)]]) for e in engines]) == [None, None]  # type: ignore[misc]


def test_commands_are_the_leaders() -> None:
    leader, other = members(2)
    for call in (other.step, other.abort_all, other.end, lambda: other.submit([request(1)])):
        with pytest.raises(AssertionError, match="leader"):
            call()
    with pytest.raises(AssertionError, match="leader"):
        leader.follow(lambda: None)
