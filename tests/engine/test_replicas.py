"""Many replicas behind one engine: routing, exchanges, whole deltas, and replicas that are lost at any moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.engine.replicas import ReplicaEngine
from rlpost.errors import WorkerLost
from rlpost.rollout.collect import collect
from rlpost.simulation.engine import SimulatedEngine
from tests.engine.local_replicas import LocalReplicas
from tests.rollout.simulation import COST, LIMIT, build, finish_step, heavy_tailed, prompts, request


def replicas(slots, *, die=None, exchange_s=6.0, max_jump=1):
    engines = [
        SimulatedEngine(max_slots=s, length_of=heavy_tailed, max_response_tokens=LIMIT, cost=COST, max_jump=max_jump)
        for s in slots
    ]
    return LocalReplicas(engines, exchange_s=exchange_s, die=die)


def run_steps(transport, steps, *, reserve_share=0.25, **kwargs):
    """Steps of collect over the transport; checks the account and every trained token; stats by step."""
    engine = ReplicaEngine(transport, reserve_share=reserve_share)
    buffer, _, scorer, collect_settings = build(slots=engine.max_slots, **kwargs)
    stream, history = prompts(), []
    for step in range(steps):
        stats = collect(
            engine, buffer, stream, scorer, collect_settings, step=step, should_stop=lambda: not engine.max_slots
        )
        buffer.check_conservation(under_way=stats.stopped)
        history.append(stats)
        if stats.stopped:
            break
        for group in finish_step(buffer):
            for sample in group.samples:
                expected = min(heavy_tailed(f"{group.uid}/{sample.index}"), LIMIT)
                assert sample.token_ids.tolist() == list(range(expected)), "a token is missing or was made twice"
        buffer.check_conservation()
    return engine, buffer, history


def test_two_replicas_are_kept_full_with_two_exchanges_under_way():
    transport = replicas([4, 4])
    _, _, history = run_steps(transport, 12, n=6, g=4, oversample=2.0)
    assert transport.most_under_way == 2
    busy = [s for s in history if s.work.step_s]
    running = np.concatenate([s.work.running for s in busy])
    seconds = np.concatenate([s.work.step_s for s in busy])
    assert max(running) == 4, "a replica decoded more than its slots, or never filled them"
    assert (running * seconds).sum() / (4 * seconds).sum() > 0.95
    assert {r for s in busy for r in s.spans.replica} == {0, 1}


def test_requests_go_where_most_room_is():
    engine = ReplicaEngine(replicas([2, 6]), reserve_share=0.0)
    placed = engine.submit([request(f"{n}/0") for n in range(8)])
    assert placed.count(0) == 2 and placed.count(1) == 6
    assert engine.num_in_flight == 8
    with pytest.raises(AssertionError, match="max_slots"):
        engine.submit([request("9/0")])


def test_a_carried_over_sample_may_resume_on_another_replica():
    transport = replicas([3, 3])
    _, _, history = run_steps(transport, 20, n=3, g=3, oversample=2.0)
    stays = {}
    for stats in history:
        for uid, index, replica in zip(stats.spans.uid, stats.spans.index, stats.spans.replica, strict=True):
            stays.setdefault((uid, index), set()).add(replica)
    assert any(len(where) == 2 for where in stays.values())


def test_a_lost_replica_gives_back_what_it_had_reported():
    transport = replicas([4, 4], die={1: 3})
    engine = ReplicaEngine(transport)
    engine.submit([request(f"{n}/0") for n in range(10)])
    returned, ended = [], []
    while engine.num_in_flight:
        result = engine.step()
        returned += result.returned
        ended += result.deltas
    assert [loss.replica for loss in engine.losses] == [1] and "killed" in engine.losses[0].reason
    assert (engine.max_slots, engine.reserve) == (4, 1)
    assert returned and len({d.request_id for d in [*returned, *ended]}) == 10
    for delta in returned:
        assert delta.token_ids.tolist() == list(range(len(delta.token_ids))) and not delta.finish_reason
    assert max(len(d.token_ids) for d in returned) >= 6, "what three reports told of is kept"


def test_a_replica_lost_while_stopping_loses_only_what_was_not_reported():
    transport = replicas([4, 4], die={0: 2})
    engine = ReplicaEngine(transport)
    engine.submit([request(f"{n}/0") for n in range(10)])
    ended = [d for _ in range(3) for d in engine.step().deltas]
    last = engine.abort_all()
    assert engine.num_in_flight == 0 and [loss.replica for loss in engine.losses] == [0]
    assert len({d.request_id for d in [*ended, *last.deltas]}) == 10


def test_without_any_replica_the_step_says_so():
    engine = ReplicaEngine(replicas([2], die={0: 1}))
    engine.submit([request("0/0"), request("1/0")])
    while engine.num_in_flight:
        engine.step()
    with pytest.raises(WorkerLost, match="replica 0 was killed"):
        engine.step()


@settings(deadline=None, max_examples=60)
@given(
    slots=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    die=st.dictionaries(st.integers(0, 3), st.integers(0, 25), max_size=4),
    exchange_s=st.sampled_from([1.0, 4.0, 30.0]),
    reserve_share=st.sampled_from([0.0, 0.25, 2.0]),
    n=st.integers(1, 5),
    g=st.integers(1, 4),
    oversample=st.sampled_from([1.0, 1.5, 3.0]),
)
def test_nothing_is_lost_whoever_dies(slots, die, exchange_s, reserve_share, n, g, oversample):
    transport = replicas(slots, die=die, exchange_s=exchange_s)
    engine, buffer, history = run_steps(
        transport, 8, reserve_share=reserve_share, n=n, g=g, oversample=oversample, staleness=2
    )
    assert history[-1].stopped or len(history) == 8
    assert not history[-1].stopped or not engine.max_slots  # all may also be lost in the very last stop
    if history[-1].stopped:  # nothing is admitted, nothing runs, and the step can be made again
        assert not buffer.admitted and buffer.states()["in_flight"] == 0


def test_replicas_with_free_slots_report_early_only_while_there_is_something_to_give():
    """Eight long samples hold two slots each of four replicas with four; nobody has more to submit."""
    counts = {}
    for more in (True, False):
        transport = replicas([4, 4, 4, 4], exchange_s=20.0)
        sent = transport.send
        flags = []

        def send(exchanges, sent=sent, flags=flags, more=more):
            flags.extend(exchange.has_more for _, exchange in exchanges)
            sent([(n, exchange._replace(has_more=exchange.has_more or more)) for n, exchange in exchanges])

        transport.send = send
        engine = ReplicaEngine(transport, reserve_share=0.0)
        names = [f"{n}/0" for n in range(200)]
        long = [name for name in names if heavy_tailed(name) > 30][:8]
        short = [name for name in names if heavy_tailed(name) < 4][:8]
        engine.submit([request(name) for name in [*long, *short]])
        while engine.num_in_flight:
            engine.step()
        assert flags[0] and not flags[-1], "a full engine has more to come, a drained one has not"
        counts[more] = sum(transport.answered)
    assert counts[False] < 0.5 * counts[True]


@pytest.mark.parametrize("unsent", [0, 1])
def test_a_replica_that_was_idle_when_a_step_ended_loses_no_token_later(unsent):
    """Blocks name samples by numbers, which both sides count: also over a step's end that one side has no part in."""
    transport = replicas([2, 2], exchange_s=3.0)
    engine = ReplicaEngine(transport, reserve_share=1.0)
    short = min((f"{n}/0" for n in range(50)), key=heavy_tailed)
    long = [f"{n}/1" for n in range(50) if heavy_tailed(f"{n}/1") > 20]
    placed = engine.submit([request(long[0]), request(short)])
    (idle,) = (n for n, name in zip(placed, (long[0], short), strict=True) if name == short)
    while short in engine._replicas[idle].held or engine._replicas[idle].under_way:
        engine.step()
    engine.submit([request(name) for name in long[1 : 1 + unsent]])  # numbered, and never sent
    engine.abort_all()
    engine.submit([request(name) for name in long[2:4]])
    for _ in range(4):
        engine.step()
    transport.die[idle] = transport.answered[idle]
    (delta,) = next(result.returned for result in iter(engine.step, None) if result.returned)
    assert len(delta.token_ids) > 0 and delta.token_ids.tolist() == list(range(len(delta.token_ids)))
