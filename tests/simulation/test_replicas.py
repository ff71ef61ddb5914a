"""The replicas of the virtual clock do what the real replica loop does with simulated engines, event by event."""

import pytest

from rlpost.engine.replicas import GATHER_FROM, Exchange, ReplicaEngine, gather_s
from rlpost.rollout.collect import collect
from rlpost.simulation.engine import SimulatedEngine
from rlpost.simulation.replicas import SimulatedReplicas
from tests.engine.local_replicas import LocalReplicas
from tests.rollout.simulation import COST, LIMIT, build, finish_step, heavy_tailed, prompts, request


def local(slots, exchange_s):
    engines = [
        SimulatedEngine(max_slots=s, length_of=heavy_tailed, max_response_tokens=LIMIT, cost=COST, max_jump=1)
        for s in slots
    ]
    return LocalReplicas(engines, exchange_s=exchange_s)


def jumping(slots, exchange_s):
    return SimulatedReplicas(slots, length_of=heavy_tailed, max_response_tokens=LIMIT, cost=COST, exchange_s=exchange_s)


def run_steps(transport, steps, **kwargs):
    engine = ReplicaEngine(transport)
    buffer, _, scorer, settings = build(slots=engine.max_slots, **kwargs)
    stream, history = prompts(), []
    for step in range(steps):
        stats = collect(engine, buffer, stream, scorer, settings, step=step)
        buffer.check_conservation()
        for group in finish_step(buffer):
            for sample in group.samples:
                assert sample.num_tokens == min(heavy_tailed(f"{group.uid}/{sample.index}"), LIMIT)
        history.append(stats)
    return engine, history


@pytest.mark.parametrize("exchange_s", [3.0, 6.0, 40.0])
@pytest.mark.parametrize("slots", [[5], [4, 4, 7]])
def test_every_sample_has_its_length_and_no_slot_more_is_used(slots, exchange_s):
    _, history = run_steps(jumping(slots, exchange_s), 12, n=6, g=4)
    assert all(max(s.work.running, default=0) <= max(slots) for s in history)
    assert sum(s.num_generated for s in history) == sum(
        s.work.slot_seconds() > 0 and sum(s.work.running) for s in history
    )


def test_reports_that_come_soon_after_the_first_one_are_taken_in_with_it():
    """Each replica joins a little later than the one before; as many steps later as they are apart they report."""
    exchange_s = 40.0
    for num_replicas in (GATHER_FROM - 1, 4 * GATHER_FROM):
        transport = jumping([4] * num_replicas, exchange_s)
        window_s, apart_s = gather_s(num_replicas, exchange_s), 0.3
        for n in range(num_replicas):
            transport._clock_s = n * apart_s
            transport.send([(n, Exchange(requests=[request(f"{n}/0", 200)], has_more=False))])
        first_s = min(transport._events)[0]
        reports = transport.wait()
        assert (len(reports) > 3) == (num_replicas > GATHER_FROM)
        assert len(reports) == (1 if not window_s else 1 + int(window_s / apart_s))
        assert transport.now() == pytest.approx(first_s + window_s)


@pytest.mark.parametrize("exchange_s", [3.0, 6.0])
def test_one_replica_takes_the_time_of_the_real_loop_on_a_simulated_engine(exchange_s):
    engine, _ = run_steps(jumping([8], exchange_s), 12, n=6, g=4)
    reference, _ = run_steps(local([8], exchange_s), 12, n=6, g=4)
    assert engine.now() == pytest.approx(reference.now(), rel=0.05)
