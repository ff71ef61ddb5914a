"""Runs of ``collect`` on the simulated engine, as the loop would frame them."""

import itertools

import numpy as np

from rlpost.engine.protocol import Request, SamplingSettings
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect, sample_seed
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

LIMIT = 64
COST = StepCost(base_s=1.0, sample_s=0.01, prefill_s=0.001)


def prompts(start=0):
    return (Prompt(uid=f"0:{i}", token_ids=np.arange(5, dtype=np.int32), text=f"p{i}") for i in itertools.count(start))


def heavy_tailed(request_id):
    seed = sample_seed(7, request_id, 0, 0)
    return max(1, int(np.exp(np.random.default_rng(seed % 2**32).normal(2.0, 1.0))))


def build(
    *,
    n=4,
    g=3,
    oversample=2.0,
    staleness=3,
    slots=8,
    length_of=heavy_tailed,
    reward=None,
    reject=None,
    max_jump=None,
    restart_stale=False,
    ledger=None,
    admission="first_complete",
    keep_kv=False,
):
    strategy = RolloutStrategy(
        groups_per_step=n,
        samples_per_group=g,
        oversample=oversample,
        max_staleness=staleness,
        restart_stale=restart_stale,
        admission=admission,
    )
    buffer = RolloutBuffer(strategy, ledger=ledger)
    engine = SimulatedEngine(
        max_slots=slots, length_of=length_of, max_response_tokens=LIMIT, cost=COST, max_jump=max_jump
    )
    scorer = InlineScorer(
        reward or (lambda response, **_: len(response) % 3), decode=lambda parts: "x" * sum(map(len, parts))
    )
    settings_ = CollectSettings(
        max_in_flight=slots,
        max_response_tokens=LIMIT,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=20,
        reject=reject or (lambda group: None),
        keep_kv=keep_kv,
    )
    return buffer, engine, scorer, settings_


def finish_step(buffer, failed=None):
    """What the loop does between two rollouts; returns the groups trained."""
    groups = buffer.rollout()
    buffer.store()
    buffer.settle(failed)
    return groups


def run(steps, **kwargs):
    buffer, engine, scorer, settings_ = build(**kwargs)
    stream = prompts()
    history = []
    most_open = 0

    def count_open(progress):
        nonlocal most_open
        most_open = max(most_open, progress.admitted + progress.open_groups)

    for step in range(steps):
        stats = collect(engine, buffer, stream, scorer, settings_, step=step, on_progress=count_open)
        assert most_open <= buffer.schedule.max_open, "more groups were open or admitted than oversample allows"
        buffer.check_conservation()
        history.append((finish_step(buffer), stats))
        buffer.check_conservation()
    return buffer, history


def request(name, new=LIMIT):
    ids = np.arange(5, dtype=np.int32)
    return Request(request_id=name, parts=(ids,), max_new_tokens=new, seed=0, sampling=SamplingSettings())
