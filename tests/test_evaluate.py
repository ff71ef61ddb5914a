"""Evaluation on the simulated engine: every response judged once, failures left out and counted."""

import numpy as np
import pytest

from rlpost.config import EvalConfig, RewardConfig
from rlpost.engine.protocol import SamplingSettings
from rlpost.errors import RunError, WorkerLost
from rlpost.evaluate import describe
from rlpost.evaluation.evaluate import evaluate
from rlpost.rewards.functions import load_functions
from rlpost.rewards.scoring import InlineScorer, RewardScorer
from rlpost.rewards.worker_pool import InlineCalls
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

PROMPTS = [Prompt(uid=f"eval:{i}", token_ids=np.arange(4, dtype=np.int32), text=str(i), reference=i) for i in range(6)]


class RecordingEngine(SimulatedEngine):
    def __init__(self, length_of=lambda request_id: 3):
        cost = StepCost(base_s=1, sample_s=0, prefill_s=0)
        super().__init__(max_slots=5, length_of=length_of, max_response_tokens=8, cost=cost)
        self.requests = []

    def submit(self, requests):
        self.requests += requests
        return super().submit(requests)


class DyingEngine(RecordingEngine):
    """All workers are lost when some responses are finished and some groups half judged."""

    num_steps = 0

    def step(self):
        self.num_steps += 1
        if self.num_steps == 3:
            raise WorkerLost("worker 0 died")
        return super().step()


def run(reward, *, k=4, length_of=lambda request_id: 3, engine=None, scorer=None):
    return evaluate(
        engine or RecordingEngine(length_of),
        PROMPTS,
        scorer or InlineScorer(reward, decode=lambda parts: str(sum(map(len, parts)))),
        EvalConfig(samples_per_prompt=k),
        max_response_tokens=8,
        sampling=SamplingSettings(),
        seed=0,
        policy_version=7,
    )


def test_accuracy_is_the_mean_over_problems():
    result = run(lambda response, *, reference, **_: {"reward": 5.0, "accuracy": float(reference < 3)})
    assert result.correct.tolist() == [1, 1, 1, 0, 0, 0] and result.accuracy.mean == 0.5
    assert result.problems == tuple(p.uid for p in PROMPTS)
    assert {k: v.mean for k, v in result.pass_at.items()} == {1: 0.5, 2: 0.5, 4: 0.5}
    assert result.num_samples == 24 and result.mean_response_tokens == 3 and result.truncated_share == 0
    assert all(s.policy_versions.tolist() == [7, 7, 7] for _, s in result.samples)


def test_each_response_has_a_seed_of_its_own_and_the_same_at_every_evaluation():
    first, second = RecordingEngine(), RecordingEngine()
    result = run(lambda response, **_: 1.0, engine=first)
    run(lambda response, **_: 1.0, engine=second)
    assert len({r.seed for r in first.requests}) == 24
    assert {r.request_id: r.seed for r in first.requests} == {r.request_id: r.seed for r in second.requests}
    assert max(result.work.running) == 5, "the engine's slots stood empty"


def test_responses_are_reported_in_the_order_of_prompts_and_draws():
    result = run(lambda response, **_: 1.0, length_of=lambda request_id: 8 - int(request_id[5]))
    assert [(s.uid, s.index) for _, s in result.samples] == [(p.uid, i) for p in PROMPTS for i in range(4)]


def test_pass_at_k_counts_whole_problems_only():
    def reward(response, *, reference, **_):
        failing.append(reference)
        if reference == 0 and failing.count(0) > 1:
            raise ValueError("unreadable")
        return float(reference == 0)

    failing = []
    result = run(reward)
    assert result.num_failed == 3 and result.pass_at[4].mean == 0.0, "a problem with one judged response has no pass@4"


def test_cut_responses_and_rewards_without_an_accuracy_part():
    def length_of(request_id):
        return 99 if request_id.startswith("eval:0") else 2

    result = run(lambda response, **_: float(response == "8"), length_of=length_of)
    assert result.truncated_share == pytest.approx(1 / 6) and result.accuracy.mean == pytest.approx(1 / 6)


def scorer_of_groups(function):
    calls = InlineCalls(load_functions(RewardConfig(function=function, workers=0)))
    return RewardScorer(calls, lambda parts: str(sum(map(len, parts))), group_size=4)


def test_an_evaluation_whose_workers_are_lost_is_made_again_from_its_beginning():
    def best(responses, *, reference):
        return [float(i < reference) for i in range(len(responses))]

    scorer = scorer_of_groups(best)
    with pytest.raises(WorkerLost):
        run(best, engine=DyingEngine(), scorer=scorer)
    assert scorer.num_pending
    again, undisturbed = run(best, scorer=scorer), run(best, scorer=scorer_of_groups(best))
    assert again.num_samples == 24 and again.correct.tolist() == undisturbed.correct.tolist()
    assert not scorer.num_pending


def test_a_group_function_gets_the_k_responses_of_a_problem():
    sizes = []

    def best(responses, *, reference):
        sizes.append((reference, len(responses)))
        return [float(i == 0) for i in range(len(responses))]

    result = run(best, scorer=scorer_of_groups(best))
    assert sorted(sizes) == [(i, 4) for i in range(6)] and result.accuracy.mean == 0.25


def test_failures_are_left_out_and_counted():
    def reward(response, *, reference, **_):
        if reference == 0:
            raise ValueError("unreadable")
        return 1.0

    result = run(reward)
    assert result.num_failed == 4 and len(result.correct) == 5 and result.accuracy.mean == 1.0
    assert "4 responses could not be scored and are left out (4 reward_error)" in describe(result, "m")
    assert result.metrics()["eval/failed/reward_error"] == result.metrics()["eval/num_failed"] == 4


def test_when_nothing_can_be_judged_it_says_why():
    def reward(response, **_):
        raise ValueError("unreadable")

    with pytest.raises(RunError, match="unreadable"):
        run(reward)
