"""The controller's own cost with many replicas: the real ``collect``, buffer and ``ReplicaEngine`` on a virtual clock.

Called by ``benchmarks/scale.py`` and by the test that keeps the cost per sample flat. Only generation is simulated
(``simulation.replicas``); its CPU time is measured separately and not counted as the controller's.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlpost.engine.protocol import SamplingSettings
from rlpost.engine.replicas import Exchange, Loss, ReplicaEngine, Replicas, Report
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import StepCost
from rlpost.simulation.replicas import SimulatedReplicas
from rlpost.simulation.strategies import no_scores
from rlpost.types import Prompt
from rlpost.workers.cluster.gc_pause import SHARE, CycleSearch

SAMPLES_PER_GROUP = 8
CAP = 32_768  # tokens
MEAN_TOKENS, SIGMA = 8192, 1.0  # of the lognormal, cut at the cap
TOKENS_PER_S = 30.0  # of one sample, with all slots busy
PREFILL_RATIO = 50.0  # tokens prefilled in the time of one decoded token, with all slots busy
EXCHANGE_S = 2.0
MAX_STALENESS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One point of the curve: a step trains as many samples as the replicas have slots."""

    replicas: int
    slots: int = 256
    warm_up: int = 3
    steps: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Sums over the measured steps."""

    replicas: int
    slots: int
    steps: int
    samples: int  # trained
    tokens: int  # generated
    virtual_s: float  # of generation, including aborts
    controller_s: float  # CPU time outside the transport, without searches for reference cycles
    transport_s: float  # CPU time of the simulated replicas
    idle_share: float
    reports: int
    exchanges: int
    peak_rss_bytes: int  # of the process, over its lifetime
    full_search_s: float  # one search of all objects for reference cycles, after the last step

    @property
    def share(self) -> float:
        """The controller's CPU time over the time in which the cluster generates, including searches for cycles."""
        return self.controller_s / self.virtual_s + min(SHARE, self.full_search_s * self.steps / self.virtual_s)

    @property
    def controller_us_per_sample(self) -> float:
        return 1e6 * self.controller_s / self.samples


class MeteredReplicas:
    """A transport, with the CPU time spent in it and the amounts that passed through it."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.slots: Sequence[int] = replicas.slots
        self.cpu_s = 0.0
        self.exchanges = self.reports = 0

    def send(self, exchanges: Sequence[tuple[int, Exchange]]) -> None:
        started = time.process_time()
        self._replicas.send(exchanges)
        self.exchanges += len(exchanges)
        self.cpu_s += time.process_time() - started

    def wait(self) -> Sequence[Report | Loss]:
        started = time.process_time()
        reports = self._replicas.wait()
        self.reports += len(reports)
        self.cpu_s += time.process_time() - started
        return reports

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        started = time.process_time()
        reports = self._replicas.stop(replicas)
        self.reports += len(reports)
        self.cpu_s += time.process_time() - started
        return reports

    def now(self) -> float:
        return self._replicas.now()


def median_for(mean: float, cap: float, sigma: float) -> float:
    """The median of the lognormal whose mean is ``mean`` after it is cut at ``cap``."""
    cdf = NormalDist().cdf

    def mean_of(median: float) -> float:
        z = math.log(cap / median) / sigma
        return median * math.exp(sigma**2 / 2) * cdf(z - sigma) + cap * (1 - cdf(z))

    low, high = 1.0, cap
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(middle) < mean else (low, middle)
    return low


def length_table(size: int = 1 << 16) -> np.ndarray:
    """Quantiles of the response lengths, i32[size]."""
    median = median_for(MEAN_TOKENS, CAP, SIGMA)
    inverse = NormalDist().inv_cdf
    return np.array(
        [min(CAP + 1, max(1, round(median * math.exp(SIGMA * inverse((n + 0.5) / size))))) for n in range(size)],
        np.int32,
    )


def build_replicas(load: Load) -> SimulatedReplicas:
    lengths = length_table()

    def length_of(request_id: str) -> int:
        digest = hashlib.blake2b(request_id.encode(), digest_size=2).digest()
        return int(lengths[int.from_bytes(digest, "little")])

    iteration_s = 1 / TOKENS_PER_S
    cost = StepCost(base_s=iteration_s, sample_s=0.0, prefill_s=iteration_s / load.slots / PREFILL_RATIO)
    return SimulatedReplicas(
        [load.slots] * load.replicas,
        length_of=length_of,
        max_response_tokens=CAP,
        cost=cost,
        exchange_s=EXCHANGE_S,
    )


def run(load: Load, *, ledger: Ledger | None = None) -> Point:
    slots = load.replicas * load.slots
    groups = slots // SAMPLES_PER_GROUP
    transport = MeteredReplicas(build_replicas(load))
    engine = ReplicaEngine(transport)
    strategy = RolloutStrategy(
        groups_per_step=groups,
        samples_per_group=SAMPLES_PER_GROUP,
        oversample=2.0,
        max_staleness=MAX_STALENESS,
        adaptive=True,
    )
    buffer = RolloutBuffer(strategy, ledger=ledger, slots=slots)
    settings = CollectSettings(
        max_in_flight=slots,
        max_response_tokens=CAP,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=groups,
        reject=lambda group: None,
    )
    scorer, stream = no_scores(), prompts()
    cycle_search = CycleSearch(engine.now)
    busy_s = offered_s = virtual_s = controller_s = transport_s = 0.0
    samples = tokens = reports = exchanges = 0
    for step in range(load.warm_up + load.steps):
        started, inside, seen, sent = time.process_time(), transport.cpu_s, transport.reports, transport.exchanges
        searched = cycle_search.spent_s
        with cycle_search.held_back():  # as on a cluster
            stats = collect(engine, buffer, stream, scorer, settings, step=step)
        trained = buffer.rollout()
        buffer.store()
        buffer.settle()
        buffer.check_conservation()
        spent, inside = time.process_time() - started, transport.cpu_s - inside
        if step < load.warm_up:
            continue
        virtual_s += stats.duration_s
        transport_s += inside
        controller_s += spent - inside - (cycle_search.spent_s - searched)
        busy_s += stats.work.slot_seconds()
        offered_s += stats.offered_slot_s
        samples += sum(len(g.samples) for g in trained)
        tokens += stats.num_generated
        reports += transport.reports - seen
        exchanges += transport.exchanges - sent
    full_search_s = cycle_search.search()
    return Point(
        replicas=load.replicas,
        slots=load.slots,
        steps=load.steps,
        samples=samples,
        tokens=tokens,
        virtual_s=virtual_s,
        controller_s=controller_s,
        transport_s=transport_s,
        idle_share=1 - busy_s / offered_s,
        reports=reports,
        exchanges=exchanges,
        peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        full_search_s=full_search_s,
    )


def prompts() -> Iterator[Prompt]:
    token_ids = np.zeros(512, np.int32)
    return (Prompt(uid=f"0:{n}", token_ids=token_ids, text="") for n in itertools.count())
