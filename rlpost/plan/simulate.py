"""Rollouts of a planned configuration on a virtual clock: the real ``collect`` and buffer, engines that only cost time.

The one worker of ``cluster=local`` is the simulated engine; workers of ``cluster=ray`` are simulated replicas behind
the real ``ReplicaEngine``. Lengths are a recorded run's groups or a named distribution's. Called by ``plan.predict``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpost.config import Config
from rlpost.engine.protocol import Engine, SamplingSettings
from rlpost.engine.replicas import ReplicaEngine
from rlpost.plan.recording import RecordedGroup
from rlpost.rollout.collect import CollectSettings
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.account import StepAccount
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.simulation.replicas import SimulatedReplicas
from rlpost.simulation.strategies import Workload, run_collect
from rlpost.types import Group, Prompt

NUM_DRAWS = 1 << 16  # after this many, the same groups repeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """By request id ``N/INDEX`` of the N-th draw: a response's tokens; by N: whether a filter drops the group."""

    length_of: Callable[[str], int]
    is_dropped: Callable[[int], bool] = lambda draw: False


def shuffled(groups: Sequence[RecordedGroup], *, seed: int, first: Sequence[RecordedGroup] = ()) -> Lengths:
    """Whole groups of a run, so that correlations between siblings are kept: all of them in a random order, then again
    in another, so that long simulations match the run's mean exactly. ``first`` come before them, unchanged."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(groups)) for _ in range(-(-NUM_DRAWS // len(groups)))])

    def find(draw: int) -> RecordedGroup:
        return first[draw] if draw < len(first) else groups[order[draw % NUM_DRAWS]]

    def length_of(request_id: str) -> int:
        draw, _, index = request_id.partition("/")
        lengths = find(int(draw)).lengths
        return lengths[int(index) % len(lengths)]

    return Lengths(length_of=length_of, is_dropped=lambda draw: find(draw).dropped)


def simulate(
    cfg: Config,
    cost: StepCost,
    lengths: Lengths,
    *,
    prompt_tokens: float,
    num_steps: int,
    oversample: float | None = None,
    kv_slots: int | None = None,
) -> list[StepAccount]:
    """``num_steps`` rollouts, starting from an empty buffer; ``oversample`` None: as configured, adaptive if that is
    on; ``kv_slots``: the maximum number of samples in the KV cache, None for no limit."""
    rollout = cfg.rollout
    settings = CollectSettings(
        max_in_flight=min(cfg.max_in_flight, kv_slots or cfg.max_in_flight),
        max_response_tokens=rollout.max_response_tokens,
        sampling=SamplingSettings(),
        seed=cfg.seed,
        max_filtered_groups=1 << 30,
        reject=lambda group: _reason(group, lengths),
        keep_kv=rollout.keep_kv,
    )
    load = Workload(
        groups_per_step=rollout.groups_per_step,
        samples_per_group=rollout.samples_per_group,
        settings=settings,
        prompts=lambda: _numbered(round(prompt_tokens)),
        publish=lambda: None,
    )
    strategy = RolloutStrategy.of(rollout)
    if oversample is not None:
        strategy = replace(strategy, oversample=oversample, adaptive=False)
    strategy = replace(strategy, restart_stale=False)  # lengths are given: no group becomes too old because it is long
    return list(run_collect(_engine(cfg, cost, lengths), load, strategy, num_steps=num_steps))


def _engine(cfg: Config, cost: StepCost, lengths: Lengths) -> Engine:
    slots, cap = cfg.slots_per_engine, cfg.rollout.max_response_tokens
    if cfg.cluster.kind == "local":
        return SimulatedEngine(max_slots=slots, length_of=lengths.length_of, max_response_tokens=cap, cost=cost)
    replicas = SimulatedReplicas(
        [slots] * cfg.num_engines,
        length_of=lengths.length_of,
        max_response_tokens=cap,
        cost=cost,
        exchange_s=cfg.cluster.exchange_s,
    )
    return ReplicaEngine(replicas, reserve_share=cfg.cluster.reserve_share)


def _reason(group: Group, lengths: Lengths) -> str | None:
    return "as recorded" if lengths.is_dropped(int(group.uid)) else None


def _numbered(num_tokens: int) -> Iterator[Prompt]:
    token_ids = np.zeros(max(1, num_tokens), np.int32)
    return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count())
