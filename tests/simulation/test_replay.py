"""Replaying a run in the simulator: costs are recovered, its own strategy's time is reproduced."""

import itertools
import json

import numpy as np
import pytest

from rlpost.durable.run_record import RunRecord
from rlpost.engine.protocol import SamplingSettings
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect, sample_seed
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.simulation.replay import compare_with_synchronous, fit_cost
from rlpost.types import Prompt

TRUE = StepCost(base_s=0.003, sample_s=0.0002, prefill_s=0.00005)
SHAPE = RolloutStrategy(groups_per_step=4, samples_per_group=4, oversample=2.0, max_staleness=3)
SETTINGS = CollectSettings(
    max_in_flight=16,
    max_response_tokens=128,
    sampling=SamplingSettings(),
    seed=0,
    max_filtered_groups=99,
    reject=lambda group: "unlucky" if int(group.uid.split(":")[1]) % 7 == 3 else None,
)


def length_of(request_id):
    return max(1, int(np.exp(np.random.default_rng(sample_seed(3, request_id, 0, 0) % 2**32).normal(3, 0.8))))


@pytest.fixture(scope="module")
def run():
    engine = SimulatedEngine(max_slots=16, length_of=length_of, max_response_tokens=128, cost=TRUE, max_jump=1)
    buffer = RolloutBuffer(SHAPE)
    scorer = InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")
    stream = (Prompt(uid=f"0:{n}", token_ids=np.zeros(10, np.int32), text="") for n in itertools.count())
    record = RunRecord()
    for step in range(20):
        stats = collect(engine, buffer, stream, scorer, SETTINGS, step=step)
        record.add(stats, {g.order: [s.num_tokens for s in g.samples] for g in buffer.admitted})
        buffer.settle()
    return record, buffer


def test_the_cost_of_an_iteration_is_recovered(run):
    cost = fit_cost(run[0])
    assert cost.base_s == pytest.approx(TRUE.base_s, rel=0.02)
    assert cost.sample_s == pytest.approx(TRUE.sample_s, rel=0.02)
    assert cost.prefill_s == pytest.approx(TRUE.prefill_s, rel=0.05)


def test_the_runs_own_time_is_reproduced_and_synchronous_is_slower(run):
    record, buffer = run
    open_lengths = {g.order: [s.num_tokens for s in g.samples] for g in buffer.groups.values()}
    comparison = compare_with_synchronous(record, open_lengths, SETTINGS, SHAPE, slots=16, prompt_tokens=10)
    assert comparison.error < 0.03
    assert comparison.synchronous_s > 1.1 * comparison.measured_s


def test_a_record_survives_json(run):
    copy = RunRecord()
    copy.load_state_dict(json.loads(json.dumps(run[0].state_dict())))
    assert copy.state_dict() == run[0].state_dict() and fit_cost(copy) == fit_cost(run[0])


def test_no_cost_is_negative():
    record = RunRecord()
    record.moments = np.array([[2.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    record.targets = np.array([1.0, 4.0, -1.0])
    cost = fit_cost(record)
    assert min(cost.base_s, cost.sample_s, cost.prefill_s) >= 0
