"""The engine protocol: what a rollout needs from an inference engine, one replica or many.

``engine.vllm``, ``engine.lockstep``, ``engine.replicas`` and ``simulation.engine`` implement it; ``rollout.collect``
and ``workers.colocation`` call it. An engine owns the requests in flight and nothing else: prompts, partial responses
and their versions belong to the buffer. Each token is delivered exactly once, in the delta that reports it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How tokens are sampled. A stop token ends a response and is part of it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()


class Request(NamedTuple):
    """One sample to generate or continue: the prompt and what was already generated, as token ids."""

    request_id: str
    parts: Sequence[np.ndarray]  # i32[...] each: the prompt, then what each earlier stay in the engine added
    max_new_tokens: int  # >= 1
    seed: int
    sampling: SamplingSettings

    @property
    def num_tokens(self) -> int:
        """P + tokens so far."""
        return sum(len(part) for part in self.parts)

    @property
    def token_ids(self) -> np.ndarray:
        """i32[P + tokens so far], joined on demand: many thousands of requests may wait for their replica."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)


class Delta(NamedTuple):
    """New tokens of one request since its last delta. ``finish_reason`` is "", "stop" or "length"."""

    request_id: str
    token_ids: np.ndarray  # i32[T]
    logprobs: np.ndarray  # f32[T], natural log, of the distribution sampled from
    finish_reason: str = ""


@dataclass(kw_only=True, slots=True)
class Iterations:
    """Iterations of engines, one entry each: the data behind idle shares and fitted costs.

    Arrays of machine numbers: many replicas run millions of iterations in a step.
    """

    step_s: array[float] = field(default_factory=lambda: array("d"))  # wall time, including the caller's code
    running: array[int] = field(default_factory=lambda: array("q"))  # samples that held a slot
    prefill: array[int] = field(default_factory=lambda: array("q"))  # prompt (and replayed) tokens computed
    num_prefilled: int = 0  # tokens: the sum of ``prefill``
    num_preempted: int = 0  # samples preempted because the KV cache was full, over all iterations
    kv_usage_max: float = 0.0  # largest share of the KV cache in use

    def add(self, step_s: float, running: int, prefill: int, *, times: int = 1) -> None:
        """Add ``times`` equal iterations."""
        self.step_s += array("d", (step_s,)) * times
        self.running += array("q", (running,)) * times
        self.prefill += array("q", (prefill,)) * times
        self.num_prefilled += prefill * times

    def add_engine_step(self, step_s: float, result: EngineStep) -> None:
        """One iteration of one engine, which took ``step_s`` including the caller's code."""
        self.add(step_s, result.num_running, result.num_prefill_tokens)
        self.num_preempted += result.num_preempted
        self.kv_usage_max = max(self.kv_usage_max, result.kv_usage)

    def extend(self, other: Iterations) -> None:
        self.step_s += other.step_s
        self.running += other.running
        self.prefill += other.prefill
        self.num_prefilled += other.num_prefilled
        self.num_preempted += other.num_preempted
        self.kv_usage_max = max(self.kv_usage_max, other.kv_usage_max)

    def slot_seconds(self) -> float:
        """Sum of iteration time x samples running."""
        return float(np.dot(self.step_s, self.running))


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStep:
    """What one engine step did, for accounting. Times are on the engine's own clock, in seconds."""

    deltas: Sequence[Delta]
    duration_s: float
    num_running: int  # samples that held a slot during the step
    num_prefill_tokens: int  # prompt (and replayed) tokens computed, without prefix-cache hits
    iterations: Sequence[Iterations] | None = None  # of replicas, since the last step; None: this was one iteration
    num_preempted: int = 0  # samples preempted because the KV cache was full; they resume by themselves
    kv_usage: float = 0.0  # share of the KV cache in use; 0 if unknown
    returned: Sequence[Delta] = ()  # unfinished samples no longer in flight: their replica was lost


@dataclass(kw_only=True, slots=True)
class EngineWork(Iterations):
    """The work done in a loop over ``Engine.step``."""

    own_s: float = 0.0  # of ``wall_s``, outside the engine
    wall_s: float = 0.0  # the loop's own time; with one engine, the sum of ``step_s``

    def add_step(self, wall_s: float, result: EngineStep) -> None:
        """One turn of the loop, which took ``wall_s`` in total."""
        if result.iterations is None:
            self.add_engine_step(wall_s, result)
        else:
            for iterations in result.iterations:
                self.extend(iterations)
        self.wall_s += wall_s
        self.own_s += max(0.0, wall_s - result.duration_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCapacity:
    """The capacity of an engine's KV cache."""

    tokens: int
    block_tokens: int  # a sample takes whole blocks


WAKE_TAGS = ("weights", "kv_cache")
NOTHING = EngineStep(deltas=(), duration_s=0.0, num_running=0, num_prefill_tokens=0)


class Engine(Protocol):
    """One engine, or many replicas behind one interface (``engine.replicas``)."""

    max_slots: int  # samples decoded at once, over all replicas
    kv_capacity: KVCapacity | None  # None if there is no limit, or if several engines have one each
    reserve: int  # requests held beyond that, so that a freed slot need not wait for the caller; 0 with one engine

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        """Queue requests; returns each one's replica. The caller keeps at most ``max_slots + reserve`` in flight."""

    def step(self) -> EngineStep:
        """Advance all running requests by one token (or one exchange) and return what is new. Replicas may hold back
        the tokens of a sample until it ends."""

    def abort_all(self) -> EngineStep:
        """End all requests, including paused ones; returns undelivered tokens. Afterwards nothing is in flight."""

    def pause_all(self) -> EngineStep:
        """Like :meth:`abort_all`, but requests may stay in the engine with their KV cache, out of flight, until
        :meth:`resume`. New weights may be loaded in between. An engine keeps as many as it can, or none."""

    def resume(self) -> Sequence[str]:
        """Put paused requests back in flight; returns their ids. Paused requests that are not among them have ended."""

    @property
    def num_in_flight(self) -> int: ...

    def now(self) -> float:
        """Seconds on the engine's clock (monotonic; virtual in the simulated engine)."""


class DeviceEngine(Engine, Protocol):
    """One engine beside a trainer rank on a device: what ``workers.colocation`` also needs."""

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logprobs at temperature 1 of each sequence's tokens given the preceding ones: f32[len - 1] each."""

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None:
        """Copy HF-named tensors in place, bucket by bucket, and invalidate the prefix cache."""

    def read_weight(self, name: str) -> Any:
        """The tensor the engine computes with for this HF name (a slice of a fused weight), for the fingerprint."""

    def part_of_weight(self, name: str, tensor: Any) -> Any:
        """What ``read_weight`` must equal, from a whole HF tensor: all of it, or the part of one engine member."""

    def sleep(self) -> None:
        """Release the device's memory; nothing may be in flight."""

    def wake(self, tags: Sequence[str] = WAKE_TAGS) -> None:
        """Take memory again: "weights" (undefined until ``load_weights`` if they were dropped), then "kv_cache"."""

    def shutdown(self) -> None: ...
