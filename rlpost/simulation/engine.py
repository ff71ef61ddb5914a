"""An engine without a model: a virtual clock, a cost per step, and given lengths. For tests, planning and replay.

Implements ``engine.protocol.DeviceEngine``. A step jumps to the next event (the earliest finish), so simulated time
does not depend on how fast this code runs. The time of n decode iterations with r running samples and p prefilled
tokens is ``n * (base_s + sample_s * r) + prefill_s * p``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpost.engine.protocol import NOTHING, WAKE_TAGS, Delta, EngineStep, KVCapacity, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds of one decode iteration: ``base_s + sample_s * running + prefill_s * prefilled tokens``."""

    base_s: float
    sample_s: float
    prefill_s: float


@dataclass(slots=True)
class _Running:
    request: Request
    remaining: int
    finish_reason: str
    generated: int


class SimulatedEngine:
    """Lengths come from ``length_of(request_id)``: the length of the whole response, over all its resumptions.

    Args:
        max_slots: samples decoded at once.
        length_of: total response length of a request id, in tokens; it is cut at ``max_response_tokens``.
        max_response_tokens: what a request's ``max_new_tokens`` counts down from.
        cost: seconds per iteration.
        max_jump: maximum iterations per step; 1 reports token by token, as a real engine does.
        vocab_size: tokens are ``position % vocab_size``; logprobs are ``-log(vocab_size)``.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        length_of: Callable[[str], int],
        max_response_tokens: int,
        cost: StepCost,
        max_jump: int | None = None,
        vocab_size: int = 64,
    ) -> None:
        self.max_slots = max_slots
        self.reserve = 0
        self.kv_capacity: KVCapacity | None = None
        self._length_of = length_of
        self._limit = max_response_tokens
        self._cost = cost
        self._max_jump = max_jump
        self._running: dict[str, _Running] = {}
        self._paused: dict[str, _Running] = {}
        self._prefill = 0
        self._clock_s = 0.0
        self._tokens = (np.arange(max_response_tokens + 1) % vocab_size).astype(np.int32)
        self._logprobs = np.full(max_response_tokens + 1, -np.log(vocab_size), np.float32)

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        for request in requests:
            assert request.request_id not in self._running, f"{request.request_id} is already in flight"
            assert len(self._running) < self.max_slots, "more requests than slots"
            so_far = self._limit - request.max_new_tokens
            total = self._length_of(request.request_id)
            self._running[request.request_id] = _Running(
                request=request,
                remaining=max(1, min(total, self._limit) - so_far),
                finish_reason="stop" if total <= self._limit else "length",
                generated=so_far,
            )
            self._prefill += request.num_tokens
        return [0] * len(requests)

    def step(self) -> EngineStep:
        running = len(self._running)
        assert running, "step() with nothing in flight"
        jump = min(r.remaining for r in self._running.values())
        jump = min(jump, self._max_jump or jump)
        duration = jump * (self._cost.base_s + self._cost.sample_s * running) + self._cost.prefill_s * self._prefill
        self._clock_s += duration
        prefill, self._prefill = self._prefill, 0
        deltas = [self._advance(r, jump) for r in list(self._running.values())]
        return EngineStep(deltas=deltas, duration_s=duration, num_running=running, num_prefill_tokens=prefill)

    def _advance(self, r: _Running, jump: int) -> Delta:
        tokens = slice(r.generated, r.generated + jump)  # views of one shared array
        r.generated += jump
        r.remaining -= jump
        finished = r.remaining == 0
        if finished:
            del self._running[r.request.request_id]
        return Delta(
            request_id=r.request.request_id,
            token_ids=self._tokens[tokens],
            logprobs=self._logprobs[tokens],
            finish_reason=r.finish_reason if finished else "",
        )

    def pause_all(self) -> EngineStep:
        self._paused, self._running = self._running, {}
        return NOTHING

    def resume(self) -> Sequence[str]:
        assert not self._running, "resume() with requests in flight"
        self._running = self._paused
        self._paused = {}
        return list(self._running)

    def abort_all(self) -> EngineStep:
        self._running.clear()
        self._paused.clear()
        self._prefill = 0
        return NOTHING

    @property
    def num_in_flight(self) -> int:
        return len(self._running)

    def now(self) -> float:
        return self._clock_s

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full(max(0, len(s) - 1), self._logprobs[0], np.float32) for s in sequences]

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None:
        for _ in buckets:
            pass

    def read_weight(self, name: str) -> Any:
        raise KeyError(f"the simulated engine has no weights, asked for {name!r}")

    def part_of_weight(self, name: str, tensor: Any) -> Any:
        return tensor

    def sleep(self) -> None:
        assert not self._running, "sleep() with requests in flight"

    def wake(self, tags: Sequence[str] = WAKE_TAGS) -> None:
        return None

    def shutdown(self) -> None:
        self._running.clear()
