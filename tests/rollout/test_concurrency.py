"""Samples in flight from the KV cache: hand-worked numbers, and the promise of the formula on simulated slots."""

import numpy as np
import pytest

from rlpost.engine.protocol import KVCapacity
from rlpost.rollout.concurrency import full_length_samples, samples_that_fit
from rlpost.rollout.lengths import LengthEstimate


def tokens(count):
    return KVCapacity(tokens=count, block_tokens=16)


def known(lengths, cap=1024):
    return LengthEstimate(lengths, [], cap=cap)


SIZES = {"prompt_tokens": 10.0, "max_model_len": 1000}


def test_full_length_counts_whole_blocks_and_at_least_one_sample_runs():
    assert full_length_samples(tokens(4032), max_model_len=1000) == 4  # 63 blocks of 16 each
    assert full_length_samples(tokens(4031), max_model_len=1000) == 3
    assert samples_that_fit(tokens(4032), known([], cap=990), **SIZES).samples == 4
    assert samples_that_fit(tokens(100), known([], cap=990), **SIZES).samples == 1


def test_the_lengths_seen_make_room_by_hand():
    # Always 20: mean age 10, sd sqrt(400 / 3 - 100) = 5.77; held 10 + 10 + 8 = 28; C 28 + 11.55 sqrt(C) = 4032.
    room = samples_that_fit(tokens(4032), known([20, 20]), **SIZES)
    assert room.samples == int(((np.sqrt(11.547**2 + 4 * 28 * 4032) - 11.547) / 56) ** 2) == 139
    assert "holds 4 of 1,000 tokens" in room.reason and "139 of the lengths seen: 28 tokens" in room.reason


def test_lengths_near_the_cap_never_leave_less_than_full_length_does():
    assert samples_that_fit(tokens(4032), known([990, 990], cap=990), **SIZES).samples >= 4


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_so_many_refilled_slots_seldom_need_more_than_there_is(sigma):
    rng = np.random.default_rng(1)

    def draw(size):
        return np.minimum(1024, np.maximum(1, np.round(64 * np.exp(sigma * rng.normal(size=size))))).astype(int)

    capacity, lengths = 20_000, known(draw(2000).tolist())
    count = samples_that_fit(tokens(capacity), lengths, prompt_tokens=32, max_model_len=1056).samples
    assert count > 3 * full_length_samples(tokens(capacity), max_model_len=1056)
    left, age = draw(count), np.zeros(count, int)
    used = []
    for _ in range(4000):
        age += 1
        done = age >= left
        age[done], left[done] = 0, draw(int(done.sum()))
        used.append(int((-(-(32 + age) // 16) * 16).sum()))
    steady = np.array(used[1000:])
    assert (steady > capacity).mean() < 0.08
    assert steady.mean() > 0.8 * capacity, "room is given away"
