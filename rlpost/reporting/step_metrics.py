"""One step's metrics from its groups, statistics and updates. Pure functions; ``metric_names`` explains each metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpost.rewards.scoring import ScoringCounts
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.stats import RolloutStats
from rlpost.train.protocol import UpdateResult
from rlpost.types import Group, TrainBatch, source_of
from rlpost.workers.publication import Publication


def reward_metrics(groups: Sequence[Group], stats: RolloutStats) -> dict[str, float]:
    """reward/ of the trained groups; failures are those of all results that arrived in the step."""
    scored = [s for g in groups for s in g.scored]
    rewards = np.array([s.reward for s in scored], np.float64)
    equal = [len({s.reward for s in g.scored}) == 1 for g in groups if g.scored]
    metrics: dict[str, float] = {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "reward/min": float(rewards.min()) if len(rewards) else 0.0,
        "reward/max": float(rewards.max()) if len(rewards) else 0.0,
        "reward/equal_groups_share": _mean(equal),
        "reward/failed": stats.num_failed_rewards,
    }
    metrics |= {f"reward/failed/{kind}": count for kind, count in stats.failures.items()}
    for name in sorted({n for s in scored for n in s.reward_parts}):
        metrics[f"reward/part/{name}"] = _mean([s.reward_parts[name] for s in scored if name in s.reward_parts])
    return metrics | source_metrics(groups)


def source_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """source/NAME/ of the trained groups, where the prompts come from several sources."""
    metrics: dict[str, float] = {}
    for name in sorted({source_of(g.prompt.uid) for g in groups} - {""}):
        own = [g for g in groups if source_of(g.prompt.uid) == name]
        scored = [s for g in own for s in g.scored]
        metrics[f"source/{name}/groups"] = len(own)
        metrics[f"source/{name}/reward"] = _mean([s.reward for s in scored])
        metrics[f"source/{name}/response_tokens"] = _mean([s.num_tokens for s in scored])
    return metrics


def scoring_metrics(counts: ScoringCounts, num_pending: int) -> dict[str, float]:
    """reward/: what the step's scoring took; ``num_pending`` samples are still waiting for their results."""
    metrics: dict[str, float] = {
        "reward/pending": num_pending,
        "reward/retried": counts.retried,
        "reward/replaced_workers": counts.replaced_workers,
        "reward/call_s": counts.call_s / counts.calls if counts.calls else 0.0,
        "reward/call_s/max": counts.max_call_s,
    }
    if counts.cache_lookups:
        metrics["reward/cache_hit_share"] = counts.cache_hits / counts.cache_lookups
    return metrics


def rollout_metrics(
    groups: Sequence[Group], stats: RolloutStats, buffer: RolloutBuffer, drawn_steps: Sequence[int], empty_ids: int
) -> dict[str, float]:
    """rollout/ of the step that trained ``groups``; rates are per second of generation, including the abort.

    A sample without a reward trains nothing and is left out; its tokens were discarded.

    ``empty_ids``: how many response tokens an empty text may have (its end token).
    """
    samples = [s for g in groups for s in g.scored]
    lengths = np.array([s.num_tokens for s in samples], np.float64)
    versions = np.concatenate([s.policy_versions for s in samples]) if samples else np.zeros(0)
    seconds = max(stats.duration_s, 1e-9)
    counts = {
        "consumed": len(versions),
        "generated": stats.num_generated,
        "discarded": sum(sum(v) for v in stats.dropped_lengths.values())
        + sum(s.num_tokens for g in groups for s in g.samples if s.reward is None),
        "replayed": stats.num_replayed,
    }
    num_dropped = len(stats.dropped_lengths)
    states = buffer.states()
    metrics: dict[str, float] = {f"rollout/{name}_tokens": count for name, count in counts.items()}
    metrics |= {f"rollout/{name}_tokens_per_s": count / seconds for name, count in counts.items()}
    metrics |= {
        "rollout/prefill_tokens": stats.num_prefill,
        "rollout/carried_share": float((versions < stats.step).sum()) / max(1, len(versions)),
        "rollout/idle_share": stats.idle_share,
        "rollout/slots": stats.slots,
        "rollout/preemptions": stats.work.num_preempted,
        "rollout/kv_usage_max": stats.work.kv_usage_max,
        "rollout/running_mean": stats.slots * (1 - stats.idle_share) if stats.work.step_s else 0.0,
        "rollout/own_share": stats.work.own_s / seconds,
        "rollout/engine_steps": len(stats.work.step_s),
        "rollout/launched_samples": stats.num_launched,
        "rollout/resumed_samples": stats.num_resumed,
        "rollout/kept_samples": stats.num_kept,
        "rollout/buffer_age": _mean([stats.step - d for d in drawn_steps]),
        "rollout/buffer_age_max": max((stats.step - d for d in drawn_steps), default=0),
        "rollout/buffer_groups": len(buffer.groups),
        "rollout/buffer_tokens": sum(s.num_tokens for g in buffer.groups.values() for s in g.samples),
        "rollout/open_limit": buffer.schedule.max_open,
        "rollout/ready_groups": states["ready"],
        "rollout/truncated_share": _mean([s.finish_reason == "length" for s in samples]),
        "rollout/empty_share": _mean([s.num_tokens <= empty_ids and s.finish_reason == "stop" for s in samples]),
        "rollout/accepted_share": len(groups) / max(1, len(groups) + num_dropped),
        "rollout/rejected_groups": num_dropped,
        "rollout/length/admitted_mean": _mean(lengths),
        "rollout/length/admitted_max": float(lengths.max(initial=0)),
        "rollout/length/deferred_mean": _mean(stats.deferred_lengths),
        "rollout/length/launched_mean": _mean(stats.launched_lengths),
    }
    spans = Counter(s.version_span for s in samples)
    metrics |= {f"rollout/version_span/{span}": count / len(samples) for span, count in sorted(spans.items())}
    metrics |= {f"rollout/rejected_groups/{reason}": count for reason, count in stats.rejected.items()}
    return metrics


def step_histograms(
    groups: Sequence[Group], advantages: Sequence[Any] | None, *, policy_version: int
) -> dict[str, np.ndarray]:
    """histogram/ of the trained samples; ``policy_version`` is the one that was trained. Empty ones are left out."""
    samples = [s for g in groups for s in g.scored]
    versions = [s.policy_versions for s in samples]
    values = {
        "histogram/length": np.array([s.num_tokens for s in samples], np.int64),
        "histogram/staleness": policy_version - np.concatenate(versions or [np.zeros(0, np.int32)]),
        "histogram/advantage": np.concatenate([*(np.hstack(a) for a in advantages or [] if len(a)), np.zeros(0)]),
        "histogram/reward": np.array([s.reward for s in samples], np.float64),
    }
    return {name: array for name, array in values.items() if array.size and np.isfinite(array).all()}


def update_metrics(
    results: Sequence[UpdateResult], batches: Sequence[TrainBatch], publication: Publication
) -> dict[str, Any]:
    """loss/ and mismatch/ averaged over the optimizer steps that were applied, and the publication's checks."""
    applied = [r for r in results if r.applied]
    metrics: dict[str, Any] = {
        "loss/skipped_updates": len(results) - len(applied),
        "loss/tokens": sum(b.num_tokens for b in batches),
        "loss/sequences": sum(b.num_sequences for b in batches),
        "mismatch/canary": publication.canary_mean,
        "mismatch/canary_max": publication.canary_max,
        "publish/gb_per_s": publication.num_bytes / max(publication.load_s, 1e-9) / 1e9,
        "publish/load_s": publication.load_s,
        "publish/fingerprint_s": publication.fingerprint_s,
    }
    if results:
        metrics["loss/lr"] = results[-1].lr
    if applied:
        metrics["loss/total"] = _mean([r.loss for r in applied])
        metrics["loss/grad_norm"] = _mean([r.grad_norm for r in applied])
        for name in sorted({n for r in applied for n in r.metrics}):
            values = [r.metrics[name] for r in applied if name in r.metrics]
            metrics[name] = max(values) if name.endswith("/max") else _mean(values)
    return metrics


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0
