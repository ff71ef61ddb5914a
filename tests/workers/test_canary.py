"""What the canary samples and how it judges. ``test_canary_float32.py`` and its neighbor have the real engine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlpost.engine.protocol import NOTHING, Delta
from rlpost.errors import RunError
from rlpost.workers.canary import (
    RESPONSE_TOKENS,
    CanaryResult,
    CanarySequence,
    compare,
    require_agreement,
    sample_canary,
)

TWO = [CanarySequence(np.arange(5, dtype=np.int32), 3), CanarySequence(np.arange(4, dtype=np.int32), 1)]
EXPECTED = [np.zeros(4, np.float32), np.zeros(3, np.float32)]


def found(first: list[float], second: list[float]) -> list[np.ndarray]:
    return [np.array(values, np.float32) for values in (first, second)]


def test_the_mean_is_over_sampled_tokens_alone_and_the_largest_beside_it():
    result = compare(TWO, EXPECTED, found([9.0, 9.0, 0.5, -0.25], [0.0, 0.25, 0.25]))
    assert result == CanaryResult(mean=1.25 / 5, max=0.5, worst=0)
    assert compare(TWO, EXPECTED, found([9.0, 9.0, 0.0, 0.0], [0.0, 0.0, -1.0])) == CanaryResult(0.2, 1.0, 1)


@pytest.mark.parametrize("position", [0, 1])
def test_a_nan_fails_whatever_the_threshold_and_names_its_sequence(position):
    values = [[0.0, 0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]
    values[position][2] = math.nan
    result = compare(TWO, EXPECTED, found(*values))
    assert result.worst == position
    with pytest.raises(RunError, match=rf"canary.*nan nats \(largest nan; worst in sequence {position}\)"):
        require_agreement(result, math.inf)


def test_the_threshold_itself_is_allowed_and_nothing_above_it():
    require_agreement(CanaryResult(0.25, 7.0, 1), 0.25)
    with pytest.raises(RunError, match=r"0\.26 nats \(largest 7; worst in sequence 1\).*at most 0\.25"):
        require_agreement(CanaryResult(0.26, 7.0, 1), 0.25)


def test_without_a_sequence_there_is_nothing_to_disagree_on():
    assert compare([], [], []) == CanaryResult(0.0, 0.0, 0)


class Counting:
    """An engine that continues each prompt by counting from its seed, two tokens at a time."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots, self.live, self.most, self.parts = max_slots, {}, 0, []

    def submit(self, requests):  # type: ignore[no-untyped-def]
        self.live |= {r.request_id: [r.seed, r.max_new_tokens] for r in requests}
        self.parts += [r.token_ids.tolist() for r in requests]
        self.most = max(self.most, len(self.live))
        assert self.most <= self.max_slots

    @property
    def num_in_flight(self) -> int:
        return len(self.live)

    def step(self):  # type: ignore[no-untyped-def]
        deltas = []
        for request_id, (seed, left) in list(self.live.items()):
            number = min(2, left)
            deltas.append(Delta(request_id, np.full(number, seed, np.int32), np.zeros(number, np.float32)))
            self.live[request_id][1] -= number
            if left == number:
                del self.live[request_id]
        from dataclasses import replace

        return replace(NOTHING, deltas=deltas)


@pytest.mark.parametrize("slots", [1, 3, 4, 64])
def test_each_prompt_is_continued_with_as_many_slots_as_there_are(slots):
    prompts = [np.arange(n, dtype=np.int32) for n in (3, 1, 9, 5)]
    engine = Counting(slots)
    sequences = sample_canary(engine, prompts, max_tokens=500)
    assert engine.num_in_flight == 0 and engine.most == min(slots, 4)
    for seed, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        assert sequence.num_prompt_tokens == len(prompt)
        assert sequence.token_ids.tolist() == [*prompt.tolist(), *[seed] * RESPONSE_TOKENS]
        assert sequence.token_ids.dtype == np.int32


@pytest.mark.parametrize("max_tokens", [2, 3, 20, 127, 128, 129, 200])
def test_a_long_prompt_keeps_its_end_and_leaves_room_for_the_response(max_tokens):
    prompt = np.arange(1000, dtype=np.int32)
    (sequence,) = sample_canary(Counting(4), [prompt], max_tokens=max_tokens)
    sampled = min(RESPONSE_TOKENS, max_tokens // 2)
    assert len(sequence.token_ids) == max_tokens
    assert sequence.num_prompt_tokens == max_tokens - sampled >= 1
    assert sequence.token_ids[: sequence.num_prompt_tokens].tolist() == list(range(1000 - max_tokens + sampled, 1000))


def test_a_context_without_room_for_two_tokens_has_no_canary():
    assert sample_canary(Counting(4), [np.arange(3, dtype=np.int32)], max_tokens=1) == []
