"""Where a planned configuration leaves the measured range, in words: the assumptions made there."""

from __future__ import annotations

from collections.abc import Collection

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.config.resolve import WRITTEN_OUT
from rlpost.durable.config_changes import changed_keys, is_among
from rlpost.plan.costs import Costs, fit_update
from rlpost.plan.recording import Recording

# Keys that the simulation follows, and keys that cost a step nothing; ``*`` covers everything below.
MODELLED = (
    *("rollout.groups_per_step", "rollout.samples_per_group", "rollout.oversample", "rollout.adaptive_oversample"),
    *("rollout.max_staleness", "rollout.admission", "rollout.max_in_flight", "rollout.max_response_tokens"),
    "rollout.keep_kv",
    *("engine.max_slots", "cluster.kind", "cluster.num_workers", "cluster.exchange_s", "cluster.reserve_share"),
)
FREE = (
    *("name", "description", "runs_dir", "ledger_dir", "seed", "steps", "watchdog_s", "canary_threshold"),
    *("mismatch_stop", "eval.*", "checkpoint.*", "logging.*", "sft.*", "user.*"),
)
SAME_SIZE = 0.1  # tokens per rank within this share of the recorded ones do not count as extrapolation


def find_extrapolated(
    cfg: Config, recording: Recording, costs: Costs, *, given: Collection[str], lengths: str | None
) -> list[str]:
    """One line per assumption; ``given``: costs set by the user, which need no explanation."""
    run, notes = recording.cfg, []
    ranks, before = cfg.cluster.num_workers, run.cluster.num_workers
    if cfg.cluster.kind != run.cluster.kind and "rollout_s" not in given:
        notes.append(
            f"the run had cluster={run.cluster.kind}: a rollout's time beyond its iterations is taken from that run"
        )
    if ranks != before:
        notes.append(
            f"{ranks} workers, but the run had {before}: each engine is assumed to be as fast as the run's, which "
            "is true if every worker has its own device"
        )
        if ranks > before and "reduce_s" not in given:
            known = "are those of the run" if before > 1 else "are not included, because the run had none"
            notes.append(f"the collectives of an update over {ranks} ranks {known}; cost.reduce_s adds to them")
    if recording.kv_slots is not None:
        taken = "is used as the limit again" if cfg.num_engines == 1 else "is not used as a limit for several engines"
        notes.append(f"the run's KV cache held {recording.kv_slots} samples at once; that {taken}")
    notes += _about_samples(cfg, run)
    notes += _about_update(cfg, recording, costs, given)
    if not recording.evaluations and not {"iteration_s", "sample_s"} <= set(given):
        notes.append(
            "the run has no evaluation after its warm-up: if its slots were always full, an iteration's fixed cost "
            "and the cost per sample cannot be separated"
        )
    if lengths is None:
        notes += _about_lengths(cfg, recording)
    changes = [c for c in changed_keys(to_yaml(run), to_yaml(cfg)) if not is_among(c.key, (*MODELLED, *FREE))]
    # what the plan leaves open is taken to be what it was in the run, whose configuration is resolved
    other = [c for c in changes if not (c.key in WRITTEN_OUT and c.now in (None, "auto"))]
    if other:
        notes.append("costs and lengths are the run's, although these keys differ: " + "; ".join(map(str, other)))
    return notes


def _about_samples(cfg: Config, run: Config) -> list[str]:
    notes = []
    if cfg.slots_per_engine > run.slots_per_engine:
        notes.append(
            f"engine.max_slots={cfg.slots_per_engine}: iterations with more than {run.slots_per_engine} samples were "
            "not measured; each additional sample is assumed to add the same time"
        )
    size, before = cfg.rollout.samples_per_group, run.rollout.samples_per_group
    if size > before:
        notes.append(f"rollout.samples_per_group={size}: a group's lengths are the run's {before}, repeated")
    samples = cfg.rollout.groups_per_step * size
    if samples != run.rollout.groups_per_step * before:
        notes.append(
            f"{samples} samples in a step, but the run had {run.rollout.groups_per_step * before}: the rest of a step "
            "(ledger, logs) is assumed to be the same"
        )
    return notes


def _about_update(cfg: Config, recording: Recording, costs: Costs, given: Collection[str]) -> list[str]:
    run, rollout = recording.cfg, cfg.rollout
    scale = rollout.groups_per_step * rollout.samples_per_group / cfg.cluster.num_workers
    scale /= run.rollout.groups_per_step * run.rollout.samples_per_group / run.cluster.num_workers
    if {"update_s", "update_token_s"} <= set(given) or abs(scale - 1) <= SAME_SIZE:
        return []
    how = f"an update has about {scale:.2g} x the run's tokens per rank: "
    if fit_update(recording.steps, ranks=run.cluster.num_workers).is_proportional:
        return [how + "its time is assumed to be proportional, because the run's steps show no fixed part"]
    return [how + f"{costs.update_s:.3g} s are assumed to be fixed, the rest proportional"]


def _about_lengths(cfg: Config, recording: Recording) -> list[str]:
    cap, before = cfg.rollout.max_response_tokens, recording.cfg.rollout.max_response_tokens
    lengths = [n for group in recording.typical_groups for n in group.lengths]
    cut = sum(n >= before for n in lengths) / len(lengths)
    if cap > before and cut:
        return [f"{cut:.1%} of the run's responses were cut at {before} tokens, and are assumed to end there"]
    return []
