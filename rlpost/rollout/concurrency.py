"""How many samples fit in the engine's KV cache at once: the value of ``rollout.max_in_flight`` if it is not set.

Before any length is known, as many as fit at full length, so that vLLM never preempts one. After that, as many as fit
with the lengths seen. A slot that is refilled immediately holds a response of mean age ``E[A] = E[L^2] / (2 E[L])``
with ``E[A^2] = E[L^3] / (3 E[L])`` (renewal theory; Ross, Introduction to Probability Models, section 7.5), so C slots
hold C h tokens, h = prompt + E[A] + half a block, with a standard deviation of sd sqrt(C), and

    C h + Z sd sqrt(C) = capacity                                                                                 (1)

is solved for C. If the estimate is too low, vLLM preempts samples and recomputes their tokens: slower, but nothing is
lost, and it is counted (``rollout/preemptions``). Pure functions; ``run`` calls them before each rollout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlpost.engine.protocol import KVCapacity
from rlpost.rollout.lengths import LengthEstimate

Z = 2.0  # standard deviations of headroom: more is needed about one time in forty


@dataclass(frozen=True, kw_only=True, slots=True)
class KVRoom:
    """A limit on samples in flight, and why."""

    samples: int
    reason: str


def full_length_samples(capacity: KVCapacity, *, max_model_len: int) -> int:
    """How many samples of ``max_model_len`` tokens fit, in whole blocks."""
    blocks = -(-max_model_len // capacity.block_tokens)
    return capacity.tokens // (blocks * capacity.block_tokens)


def samples_that_fit(
    capacity: KVCapacity, lengths: LengthEstimate, *, prompt_tokens: float, max_model_len: int
) -> KVRoom:
    """At least one. ``prompt_tokens``: mean prompt length; ``max_model_len``: the longest prompt plus response."""
    worst = max(1, full_length_samples(capacity, max_model_len=max_model_len))
    holds = f"the KV cache of {capacity.tokens:,} tokens holds {worst} of {max_model_len:,} tokens"
    if not lengths.is_known:
        return KVRoom(samples=worst, reason=holds)
    mean_age, sd = lengths.ages()
    held = prompt_tokens + mean_age + capacity.block_tokens / 2
    root = (math.sqrt((Z * sd) ** 2 + 4 * held * capacity.tokens) - Z * sd) / (2 * held)
    expected = int(root**2)
    if expected <= worst:
        return KVRoom(samples=worst, reason=holds)
    return KVRoom(samples=expected, reason=f"{holds}, and {expected} of the lengths seen: {held:.0f} tokens at a time")
