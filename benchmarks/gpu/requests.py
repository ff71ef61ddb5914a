"""Requests to an engine, run to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpost.engine.protocol import Delta, Request, SamplingSettings

GREEDY = SamplingSettings(temperature=0.0)
SAMPLED = SamplingSettings()


@dataclass(slots=True)
class Responses:
    """Token ids and logprobs by request, in the order in which they came."""

    token_ids: dict[str, list[int]]
    logprobs: dict[str, list[float]]
    num_prefilled: int = 0

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self.token_ids.setdefault(delta.request_id, []).extend(delta.token_ids.tolist())
            self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs.tolist())


def generate(engine: Any, requests: Sequence[Request], *, until: int | None = None) -> Responses:
    """To the end of all, or until each has ``until`` tokens and is aborted."""
    responses = Responses({}, {})
    engine.submit(requests)
    while engine.num_in_flight:
        step = engine.step()
        responses.add(step.deltas)
        responses.num_prefilled += step.num_prefill_tokens
        lengths = [len(ids) for ids in responses.token_ids.values()]
        if until is not None and len(lengths) == len(requests) and min(lengths) >= until:
            responses.add(engine.abort_all().deltas)
    return responses


def make_requests(
    prompts: Sequence[np.ndarray], new_tokens: int, *, sampling: SamplingSettings = SAMPLED, seed: int = 1
) -> list[Request]:
    return [
        Request(request_id=f"r{i}", parts=(prompt,), max_new_tokens=new_tokens, seed=seed + i, sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]
