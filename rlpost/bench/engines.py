"""The engines a benchmark runs on: simulated with a GPU's costs, and the real one with forced lengths.

A length is forced through the request itself: no stop token, and as many new tokens as the length requires. So the real
engine sees ordinary requests and does ordinary work. Called by ``bench.rollout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlpost.engine.protocol import Engine, Request
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.simulation.lengths import LengthOf

# A dense model of a few billion parameters in bfloat16 on one data-center GPU: an iteration reads all weights (about
# 10 ms), and each sample adds its attention and sampling.
BASE_S, SAMPLE_S = 0.010, 0.00002


def gpu_cost(slots: int, *, prefill_ratio: float) -> StepCost:
    """A prefilled token costs 1 / ``prefill_ratio`` of a token decoded with all ``slots`` busy."""
    decoded_s = (BASE_S + SAMPLE_S * slots) / slots
    return StepCost(base_s=BASE_S, sample_s=SAMPLE_S, prefill_s=decoded_s / prefill_ratio)


def simulated_engine(*, slots: int, cap: int, length_of: LengthOf, cost: StepCost) -> SimulatedEngine:
    return SimulatedEngine(max_slots=slots, length_of=length_of, max_response_tokens=cap, cost=cost)


class ForcedLengths:
    """An engine whose responses have the lengths given by ``length_of``, over all their resumptions; everything except
    ``submit`` is the engine's own. ``length_of`` may be replaced while nothing is in flight."""

    def __init__(self, engine: Engine, *, cap: int, length_of: LengthOf) -> None:
        self._engine, self._cap, self.length_of = engine, cap, length_of

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        return self._engine.submit([self._forced(r) for r in requests])

    def _forced(self, request: Request) -> Request:
        so_far = self._cap - request.max_new_tokens
        left = min(self._cap, self.length_of(request.request_id)) - so_far
        assert left >= 1, f"{request.request_id} already has {so_far} tokens"
        return request._replace(max_new_tokens=left, sampling=replace(request.sampling, stop_token_ids=()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
