"""The canary: tokens that the policy samples, whose logprobs trainer and engine compute after each publication.

It finds what a comparison of weights cannot: an engine that computes another function of the same weights. Its
sequences are sampled once, by the worker's own engine before the first publication, and seeded: tokens that the policy
would not sample have large logprob differences in bfloat16 where nothing is wrong. For the same reason the mean over
the tokens is judged, not the largest difference. ``workers.local`` samples; ``workers.publication`` judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlpost.engine.protocol import Engine, Request, SamplingSettings
from rlpost.errors import RunError, explain

NUM_PROMPTS = 4
RESPONSE_TOKENS = 64  # of each sequence: a mean over 256 tokens


class CanarySequence(NamedTuple):
    """A prompt and what the engine sampled after it; the sampled tokens are compared."""

    token_ids: np.ndarray  # i32[P + R]
    num_prompt_tokens: int  # P >= 1


class CanaryResult(NamedTuple):
    """|trainer - engine| logprob over all sampled tokens, nats."""

    mean: float
    max: float
    worst: int  # the sequence with the largest mean


def sample_canary(engine: Engine, prompts: Sequence[np.ndarray], *, max_tokens: int) -> list[CanarySequence]:
    """Continues each prompt with the engine's present weights. Nothing is in flight before or after.

    A sequence has at most ``max_tokens`` tokens: at least half of them are left to a prompt, of which the last tokens
    are kept. No token ends a response, so that every sequence has as many sampled tokens.
    """
    if max_tokens < 2:
        return []
    num_new = min(RESPONSE_TOKENS, max_tokens // 2)
    kept = [np.asarray(prompt[num_new - max_tokens :], np.int32) for prompt in prompts]
    requests = [Request(f"canary:{n}", [ids], num_new, n, SamplingSettings()) for n, ids in enumerate(kept)]
    parts = {request.request_id: [ids] for request, ids in zip(requests, kept, strict=True)}
    for start in range(0, len(requests), engine.max_slots):
        engine.submit(requests[start : start + engine.max_slots])
        while engine.num_in_flight:
            for delta in engine.step().deltas:
                parts[delta.request_id].append(delta.token_ids)
    return [CanarySequence(np.concatenate(own), len(own[0])) for own in parts.values()]


def compare(
    sequences: Sequence[CanarySequence], expected: Sequence[np.ndarray], found: Sequence[np.ndarray]
) -> CanaryResult:
    """``expected`` and ``found``: f32[len - 1] of each sequence, of trainer and engine. A NaN stays one."""
    apart = [
        np.abs(np.asarray(ours, np.float64) - theirs)[sequence.num_prompt_tokens - 1 :]
        for sequence, ours, theirs in zip(sequences, expected, found, strict=True)
    ]
    if not apart:
        return CanaryResult(0.0, 0.0, 0)
    together = np.concatenate(apart)
    worst = int(np.argmax([own.mean() for own in apart]))  # a NaN counts as the largest
    return CanaryResult(float(together.mean()), float(together.max()), worst)


def require_agreement(result: CanaryResult, threshold: float) -> None:
    """Raises RunError for a mean above the threshold, nats, and for a NaN."""
    if not result.mean <= threshold:
        raise RunError(
            explain(
                "canary: mean logprob difference between trainer and engine",
                f"{result.mean:.3g} nats (largest {result.max:.3g}; worst in sequence {result.worst})",
                f"at most {threshold:g}",
                "engine and trainer compute different models; check dtype and model type (canary_threshold)",
            )
        )
