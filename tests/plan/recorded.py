"""Runs whose truth is known: the real collect on engines that cost what they are told, written down as a run writes."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from dataclasses import dataclass

import numpy as np

from rlpost.config.compose import load_config, to_yaml
from rlpost.durable.run_record import iteration_sums
from rlpost.engine.protocol import SamplingSettings
from rlpost.engine.replicas import ReplicaEngine
from rlpost.reporting.step_metrics import rollout_metrics
from rlpost.reporting.timeline import COLUMNS, TimelineWriter
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect, sample_seed
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.simulation.replicas import SimulatedReplicas
from rlpost.types import Prompt

PROMPT_TOKENS = 12
BASE = [
    *("recipe=math/arithmetic", "rollout.groups_per_step=8", "rollout.samples_per_group=4", "engine.max_slots=16"),
    *("rollout.max_staleness=3", "rollout.max_response_tokens=128", "cluster.exchange_s=0.05"),
]
TWO_WORKERS = ["cluster=ray", "cluster.num_workers=2"]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Seconds. An update is ``update_s + update_token_s * (trained and prompt tokens) / ranks``."""

    engine: StepCost = StepCost(base_s=0.003, sample_s=0.0002, prefill_s=0.00005)
    rollout_s: float = 0.05
    update_s: float = 0.1
    update_token_s: float = 0.0004
    publish_s: float = 0.02
    other_s: float = 0.03


TRUTH = Truth()


@functools.cache
def configure(*overrides):
    return load_config([*BASE, *overrides])


@functools.cache
def length_of(request_id):
    """Siblings have something in common; mean 31 tokens, few reach the cap."""
    uid = request_id.partition("/")[0]
    own, common = (np.random.default_rng(sample_seed(3, key, 0, 0) % 2**32).normal() for key in (request_id, uid))
    return max(1, int(np.exp(3.3 + 0.45 * own + 0.2 * common)))


def is_dropped(uid):
    return sample_seed(5, uid, 0, 0) % 3 == 0


def record(folder, overrides, *, steps, truth=TRUTH, drop=False, kv_slots=None):
    """Simulates a run of ``BASE`` and ``overrides`` and writes its directory; returns its folder. ``kv_slots``: samples
    that the KV cache holds."""
    cfg = configure(*overrides)
    rollout, cap = cfg.rollout, cfg.rollout.max_response_tokens
    shape = {"groups_per_step": rollout.groups_per_step, "samples_per_group": rollout.samples_per_group}
    buffer = RolloutBuffer(RolloutStrategy(**shape, oversample=rollout.oversample, max_staleness=rollout.max_staleness))
    settings = CollectSettings(
        max_in_flight=kv_slots or cfg.max_in_flight,
        max_response_tokens=cap,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=1 << 30,
        reject=lambda group: "unlucky" if drop and is_dropped(group.uid) else None,
        keep_kv=rollout.keep_kv,
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    engine = make_engine(cfg, truth)
    scorer = InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")
    token_ids = np.zeros(PROMPT_TOKENS, np.int32)
    prompts = (Prompt(uid=f"0:{n}", token_ids=token_ids, text="") for n in itertools.count())
    writer = TimelineWriter(folder, engine.now)
    writer.log(1, iterations={"phase": "eval"} | iteration_sums(dry_out(cfg, truth)))
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(steps):
            stats = collect(engine, buffer, prompts, scorer, settings, step=step)
            groups, drawn = buffer.rollout(), [g.drawn_step for g in buffer.admitted]
            buffer.settle()
            row = rollout_metrics(groups, stats, buffer, drawn, empty_ids=1)
            row |= {"step": step + 1, "time_s": engine.now(), "loss/sequences": len(groups) * rollout.samples_per_group}
            row["loss/tokens"] = sum(s.num_tokens for g in groups for s in g.samples)
            trained = row["loss/tokens"] + PROMPT_TOKENS * row["loss/sequences"]
            times = {
                "generate": stats.duration_s + truth.rollout_s,
                "update": truth.update_s + truth.update_token_s * trained / cfg.cluster.num_workers,
                "publish": truth.publish_s,
            }
            times["step"] = sum(times.values()) + truth.other_s
            log.write(json.dumps(row | {f"time/{name}": s for name, s in times.items()}) + "\n")
            writer.log(
                step + 1,
                spans={name: getattr(stats.spans, name) for name in COLUMNS},
                admitted=[g.uid for g in groups],
                dropped=stats.dropped,
                iterations={"phase": "generate"} | iteration_sums(stats.work),
            )
            if step + 1 == steps:  # an evaluation
                writer.log(step + 1, iterations={"phase": "eval"} | iteration_sums(dry_out(cfg, truth)))
    writer.close()
    return folder


def make_engine(cfg, truth):
    slots, cap = cfg.engine.max_slots, cfg.rollout.max_response_tokens
    known = {"length_of": length_of, "max_response_tokens": cap, "cost": truth.engine}
    if cfg.cluster.kind == "local":
        return SimulatedEngine(max_slots=slots, max_jump=1, **known)
    replicas = SimulatedReplicas([slots] * cfg.num_engines, exchange_s=cfg.cluster.exchange_s, **known)
    return ReplicaEngine(replicas, reserve_share=cfg.cluster.reserve_share)


def dry_out(cfg, truth):
    """Iterations with ever fewer samples, as an evaluation's last ones: they tell a fixed cost from a sample's."""
    engine = make_engine(configure("cluster=local"), truth)
    rollout = cfg.rollout
    shape = {"groups_per_step": rollout.groups_per_step, "samples_per_group": rollout.samples_per_group}
    buffer = RolloutBuffer(RolloutStrategy(**shape))
    settings = CollectSettings(
        max_in_flight=engine.max_slots,
        max_response_tokens=rollout.max_response_tokens,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=1,
        reject=lambda group: None,
    )
    prompts = (Prompt(uid=f"9:{n}", token_ids=np.zeros(9, np.int32), text="") for n in itertools.count())
    scorer = InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")
    return collect(engine, buffer, prompts, scorer, settings, step=0).work


def rewrite(run, copy, name, change):
    """A copy of the run whose lines of one file went through ``change``, which gives the line or None."""
    shutil.copytree(run, copy)
    rows = [change(json.loads(line)) for line in (run / name).read_text().splitlines()]
    (copy / name).write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return copy
