"""One step's numbers from its groups, its account and its updates. Pure; names are listed in ``metric_names``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpost.colocation import Publication
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import RolloutStats
from rlpost.train.policy import UpdateResult
from rlpost.types import Group


def rollout_metrics(
    groups: Sequence[Group], stats: RolloutStats, buffer: RolloutBuffer, drawn_steps: Sequence[int]
) -> dict[str, float]:
    """reward/ and rollout/ of the step that trained ``groups``; rates are per second of generation, abort included."""
    samples = [s for g in groups for s in g.samples]
    scored = [s for s in samples if s.reward is not None]
    rewards = np.array([s.reward for s in scored], np.float64)
    lengths = np.array([s.num_tokens for s in samples], np.float64)
    versions = np.concatenate([s.policy_versions for s in samples]) if samples else np.zeros(0)
    carried = int((versions < stats.step).sum())
    seconds = max(stats.duration_s, 1e-9)
    discarded = sum(sum(v) for v in stats.dropped_lengths.values())
    metrics = {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "reward/group_std": _mean([np.std([s.reward for s in g.scored]) for g in groups if g.scored]),
        "reward/failed_share": stats.num_failed_rewards / max(1, stats.num_judged),
        "rollout/num_samples": len(samples),
        "rollout/num_tokens": len(versions),
        "rollout/num_carried_tokens": carried,
        "rollout/carried_share": carried / max(1, len(versions)),
        "rollout/consumed_tokens_per_s": len(versions) / seconds,
        "rollout/generated_tokens_per_s": stats.num_generated / seconds,
        "rollout/discarded_tokens_per_s": discarded / seconds,
        "rollout/replayed_tokens_per_s": stats.num_replayed / seconds,
        "rollout/prefill_tokens": stats.num_prefill,
        "rollout/idle_share": stats.idle_share,
        "rollout/engine_steps": len(stats.step_s),
        "rollout/num_launched": stats.num_launched,
        "rollout/num_resumed": stats.num_resumed,
        "rollout/buffer_age": _mean([stats.step - d for d in drawn_steps]),
        "rollout/open_groups": len(buffer.groups),
        "rollout/stop_share": _mean([s.finish_reason == "stop" for s in samples]),
        "rollout/empty_share": _mean([s.num_tokens <= 1 for s in samples]),
        "rollout/length/admitted_mean": _mean(lengths),
        "rollout/length/admitted_max": float(lengths.max(initial=0)),
        "rollout/length/deferred_mean": _mean(stats.deferred_lengths),
        "rollout/length/launched_mean": _mean(stats.launched_lengths),
    }
    spans = Counter(s.version_span for s in samples)
    metrics |= {f"rollout/version_span/{span}": count / len(samples) for span, count in sorted(spans.items())}
    metrics |= {f"rollout/dropped/{reason}": count for reason, count in stats.rejected.items()}
    metrics |= {f"reward/failures/{kind}": count for kind, count in stats.failures.items()}
    for name in sorted({n for s in scored for n in s.reward_parts}):
        metrics[f"reward/part/{name}"] = _mean([s.reward_parts[name] for s in scored if name in s.reward_parts])
    return metrics


def update_metrics(results: Sequence[UpdateResult], publication: Publication) -> dict[str, Any]:
    """loss/ and mismatch/ averaged over the optimizer steps that were applied, and the publication's guards."""
    applied = [r for r in results if r.applied]
    metrics = {
        "loss/num_updates": len(applied),
        "loss/num_skipped": len(results) - len(applied),
        "publish/canary_max": publication.canary_max,
        "publish/load_s": publication.load_s,
        "publish/fingerprint_s": publication.fingerprint_s,
        "publish/gb_per_s": publication.num_bytes / max(publication.load_s, 1e-9) / 1e9,
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
