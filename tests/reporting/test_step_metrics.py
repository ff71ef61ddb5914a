"""A step's numbers worked by hand: two groups, one of them with a sample whose reward failed."""

import numpy as np
import pytest

from rlpost.engine.protocol import EngineStep
from rlpost.reporting.step_metrics import reward_metrics, rollout_metrics, update_metrics
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.stats import RolloutStats
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.train.protocol import UpdateResult
from rlpost.types import Group, Prompt, Sample, Segment, TrainBatch
from rlpost.workers.publication import Publication

STEP = 3
PUBLICATION = Publication(
    policy_version=4,
    num_bytes=3_000_000_000,
    duration_s=2.5,
    load_s=1.5,
    fingerprint_s=0.5,
    canary_s=0.25,
    canary_mean=1e-6,
    canary_max=2e-5,
)


def sample(index, versions, reward=None, finish_reason="stop", parts=None):
    """One token for each entry of ``versions``."""
    segments = tuple(
        Segment(
            token_ids=np.zeros(versions.count(v), np.int32),
            rollout_logprobs=np.zeros(versions.count(v), np.float32),
            policy_version=v,
        )
        for v in sorted(set(versions))
    )
    failure = "reward_error: x" if reward is None else None
    return Sample(
        uid="u",
        index=index,
        segments=segments,
        finish_reason=finish_reason,
        reward=reward,
        reward_parts=parts or {},
        failure=failure,
    )


def group(*samples):
    prompt = Prompt(uid="u", token_ids=np.zeros(2, np.int32), text="")
    return Group(uid="u", prompt=prompt, samples=samples)


GROUPS = [
    group(sample(0, [2, 3, 3], 1.0, parts={"a": 1.0}), sample(1, [3], 0.0, parts={"a": 0.0}), sample(2, [3] * 9)),
    group(sample(0, [1, 2, 3, 3], 0.5, "length"), sample(1, [3, 3], 0.5), sample(2, [3, 3], 0.5)),
]


@pytest.fixture
def stats():
    stats = RolloutStats(step=STEP, slots=4, started_s=10.0, ended_s=14.0)
    for seconds, running, busy in ((1.0, 4, 0.9), (3.0, 2, 2.5)):
        result = EngineStep(deltas=(), duration_s=busy, num_running=running, num_prefill_tokens=5)
        stats.work.add_step(seconds, result)
    stats.num_generated, stats.num_replayed, stats.num_failed_rewards = 20, 8, 1
    stats.failures = {"reward_error": 1}
    stats.dropped_lengths, stats.rejected = {7: [4, 6]}, {"equal_rewards": 1}
    stats.deferred_lengths, stats.launched_lengths = [5, 7], [1, 2, 3]
    return stats


def test_rewards_are_those_of_judged_samples(stats):
    metrics = reward_metrics(GROUPS, stats)
    assert metrics["reward/mean"] == pytest.approx(2.5 / 5)
    assert (metrics["reward/min"], metrics["reward/max"], metrics["reward/part/a"]) == (0.0, 1.0, 0.5)
    assert metrics["reward/std"] == pytest.approx(np.std([1, 0, 0.5, 0.5, 0.5]))
    assert metrics["reward/equal_groups_share"] == 0.5
    assert metrics["reward/failed"] == metrics["reward/failed/reward_error"] == 1


def test_a_step_without_groups_has_numbers_too(stats):
    assert reward_metrics([], stats)["reward/mean"] == 0.0
    buffer = RolloutBuffer(RolloutStrategy(groups_per_step=2, samples_per_group=3))
    assert rollout_metrics([], stats, buffer, [], empty_ids=1)["rollout/consumed_tokens"] == 0


def test_tokens_are_consumed_or_discarded_and_rates_are_per_second_of_generation(stats):
    buffer = RolloutBuffer(RolloutStrategy(groups_per_step=2, samples_per_group=3))
    metrics = rollout_metrics(GROUPS, stats, buffer, [1, 3], empty_ids=1)
    assert metrics["rollout/consumed_tokens"] == 3 + 1 + 4 + 2 + 2
    assert metrics["rollout/discarded_tokens"] == 4 + 6 + 9, "a rejected group and the sample that failed"
    assert metrics["rollout/generated_tokens_per_s"] == 20 / 4 and metrics["rollout/replayed_tokens_per_s"] == 8 / 4
    assert metrics["rollout/carried_share"] == pytest.approx(3 / 12)
    spans = {name: value for name, value in metrics.items() if name.startswith("rollout/version_span/")}
    assert spans == {"rollout/version_span/1": 3 / 5, "rollout/version_span/2": 1 / 5, "rollout/version_span/3": 1 / 5}
    assert metrics["rollout/idle_share"] == pytest.approx(1 - (1 * 4 + 3 * 2) / (4 * 4))
    assert metrics["rollout/running_mean"] == pytest.approx(2.5)
    assert metrics["rollout/own_share"] == pytest.approx((0.1 + 0.5) / 4)
    assert (metrics["rollout/buffer_age"], metrics["rollout/buffer_age_max"]) == (1.0, 2)
    assert (metrics["rollout/truncated_share"], metrics["rollout/empty_share"]) == (0.2, 0.2)
    assert metrics["rollout/accepted_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/rejected_groups"] == metrics["rollout/rejected_groups/equal_rewards"] == 1
    assert (metrics["rollout/length/admitted_mean"], metrics["rollout/length/admitted_max"]) == (2.4, 4)
    assert (metrics["rollout/length/deferred_mean"], metrics["rollout/length/launched_mean"]) == (6, 2)


def result(applied, loss, lr, **metrics):
    return UpdateResult(applied=applied, loss=loss, grad_norm=loss, lr=lr, metrics=metrics, num_tokens=4)


def test_a_skipped_update_is_counted_and_does_not_spoil_the_means():
    batch = TrainBatch(rows=(), num_tokens=4, num_sequences=2, sequence_lengths=np.array([2, 2]), policy_version=3)
    results = [
        result(True, 1.0, 0.1, **{"loss/ratio": 1.0, "loss/ratio/max": 2.0}),
        result(False, float("nan"), 0.2, **{"loss/ratio": float("nan")}),
        result(True, 3.0, 0.3, **{"loss/ratio": 1.2, "loss/ratio/max": 5.0}),
    ]
    metrics = update_metrics(results, [batch, batch], PUBLICATION)
    assert (metrics["loss/skipped_updates"], metrics["loss/total"], metrics["loss/lr"]) == (1, 2.0, 0.3)
    assert (metrics["loss/ratio"], metrics["loss/ratio/max"]) == (pytest.approx(1.1), 5.0)
    assert (metrics["loss/tokens"], metrics["loss/sequences"]) == (8, 4)
    assert metrics["publish/gb_per_s"] == 2.0
    assert (metrics["mismatch/canary"], metrics["mismatch/canary_max"]) == (1e-6, 2e-5)
    assert "loss/total" not in update_metrics([], [], PUBLICATION)
