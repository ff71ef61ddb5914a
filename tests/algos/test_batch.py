"""Packing and batch building: whole sequences, exact contents, parts, padding, what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.algos import batch as batching
from tests.algos.making import group, random_groups, sample, segment, with_old


def test_pack_by_hand() -> None:
    # 5 opens row 0 (room 3), 4 opens row 1 (room 4), 3 fits row 0 exactly, 2 row 1, 9 is too long for any row.
    assert batching.pack([3, 9, 5, 2, 4], 8) == [[1], [2, 0], [4, 3]]
    assert batching.pack([], 8) == []


@given(lengths=st.lists(st.integers(1, 40), max_size=60), limit=st.integers(1, 50))
def test_pack_properties(lengths, limit) -> None:
    rows = batching.pack(lengths, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    for row, size in zip(rows, sizes, strict=True):
        assert size <= limit or len(row) == 1
    # No two rows could have been one: best fit leaves at most one row half empty.
    assert sum(size * 2 <= limit for size in sizes) <= 1


def test_one_row_by_hand() -> None:
    answer = sample(1.0, segment(2, 3, logprob=-0.5), segment(1, 4, trainable=False), segment(1, 4, logprob=-0.25))
    (batch,) = batching.build_batches(
        [group(answer, prompt_tokens=2)], [np.array([0.5])], policy_version=5, max_row_tokens=8, pad_to_multiple=4
    )
    (row,) = batch.rows
    assert row.token_ids.tolist() == [0, 1, 1, 2, 1, 1, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert row.sequence_ids.tolist() == [0] * 6 + [-1] * 2
    assert row.loss_mask.tolist() == [False, False, True, True, False, True, False, False]
    assert row.rollout_logprobs.tolist() == [0, 0, -0.5, -0.5, 0, -0.25, 0, 0]
    assert row.policy_versions.tolist() == [-1, -1, 3, 3, -1, 4, -1, -1]
    assert row.advantages.tolist() == [0, 0, 0.5, 0.5, 0, 0.5, 0, 0]
    assert (batch.num_tokens, batch.num_sequences, batch.sequence_lengths.tolist()) == (3, 1, [3])
    dtypes = {
        name: getattr(row, name).dtype for name in ("token_ids", "loss_mask", "rollout_logprobs", "policy_versions")
    }
    assert dtypes == {"token_ids": "i8", "loss_mask": "?", "rollout_logprobs": "f4", "policy_versions": "i4"}
    assert row.old_logprobs is None and row.ref_logprobs is None


def test_the_mixed_kv_mark_follows_its_tokens_and_costs_nothing_where_there_is_none() -> None:
    mixed = segment(2, 4)._replace(mixed_kv=True)
    foreign = segment(1, 4, trainable=False)._replace(mixed_kv=True)
    answers = [sample(1.0, segment(1, 3), mixed, foreign), sample(0.0, segment(3, 4), index=1)]
    (batch,) = batching.build_batches(
        [group(*answers, prompt_tokens=2)], [np.zeros(2)], policy_version=4, max_row_tokens=6, pad_to_multiple=8
    )
    marked, clean = batch.rows
    assert marked.mixed_kv.tolist() == [False, False, False, True, True, False, False, False] and clean.mixed_kv is None


def test_advantages_per_token() -> None:
    (batch,) = batching.build_batches(
        [group(sample(1.0, segment(3)), prompt_tokens=1)],
        [[np.array([0.1, 0.2, 0.3])]],
        policy_version=0,
        max_row_tokens=8,
    )
    np.testing.assert_allclose(batch.rows[0].advantages, [0, 0.1, 0.2, 0.3], rtol=1e-6)


def test_failed_and_empty_samples_are_left_out() -> None:
    failed, empty = sample(None, segment(3), failure="reward_error"), sample(0.0)
    blocked = sample(1.0, segment(2, trainable=False))
    groups = [group(failed, sample(1.0, segment(2)), empty), group(failed, empty, blocked), group()]
    (batch,) = batching.build_batches(
        groups, [np.array([0.5, -0.5]), np.array([0.0, 0.0]), np.zeros(0)], policy_version=0, max_row_tokens=64
    )
    assert batch.num_sequences == 1 and batch.num_tokens == 2 and len(batch.rows) == 1
    assert batch.rows[0].advantages.tolist() == [0, 0, 0.5, 0.5]
    assert batching.build_batches(groups[1:], [np.zeros(2), np.zeros(0)], policy_version=0, max_row_tokens=8) == []


@given(seed=st.integers(0, 999), num_groups=st.integers(1, 9), num_parts=st.integers(1, 5), limit=st.integers(1, 60))
def test_logprobs_find_the_way_back_to_their_samples(seed, num_groups, num_parts, limit) -> None:
    """The trainer's logprob of a token is made its rollout logprob minus 1: each response gets its own back."""
    groups = random_groups(np.random.default_rng(seed), num_groups)
    values = [np.zeros(3) for _ in groups]
    batches = batching.build_batches(groups, values, policy_version=7, max_row_tokens=limit, num_parts=num_parts)
    scored = [
        replace(b, rows=tuple(replace(row, old_logprobs=row.rollout_logprobs - 1) for row in b.rows)) for b in batches
    ]
    for of_group, old_of_group in zip(groups, batching.response_logprobs(scored, groups), strict=True):
        for answer, old in zip(of_group.scored, old_of_group, strict=True):
            assert old.dtype == np.float32
            np.testing.assert_allclose(old, answer.rollout_logprobs - 1, rtol=1e-6)


def test_logprobs_of_what_was_not_trained() -> None:
    blocked, mixed = sample(1.0, segment(2, trainable=False)), sample(0.0, segment(2), segment(1, trainable=False))
    groups = [group(sample(None, segment(3), failure="reward_error"), mixed, blocked)]
    (batch,) = batching.build_batches(groups, [np.zeros(2)], policy_version=0, max_row_tokens=64)
    scored = replace(batch, rows=tuple(replace(r, old_logprobs=np.full(len(r.token_ids), -2.0)) for r in batch.rows))
    ((first, second),) = batching.response_logprobs([scored], groups)
    np.testing.assert_array_equal(first, [-2.0, -2.0, np.nan])
    assert second is None


@given(seed=st.integers(0, 999), num_groups=st.integers(1, 9), num_parts=st.integers(1, 5), limit=st.integers(1, 60))
def test_parts_are_disjoint_and_keep_groups_whole_and_every_token(seed, num_groups, num_parts, limit) -> None:
    groups = random_groups(np.random.default_rng(seed), num_groups)
    parts = batching.split_parts(groups, num_parts)
    assert sorted(place for part in parts for place in part) == [(g, i) for g in range(num_groups) for i in range(3)]
    of_group = [sorted({g for g, _ in part}) for part in parts]
    assert sorted(g for gs in of_group for g in gs) == list(range(num_groups))
    counts = [len(gs) for gs in of_group]
    assert len(parts) == min(num_parts, num_groups) and max(counts) - min(counts) <= 1
    values = [np.array([g * 10.0 + i for i in range(3)]) for g in range(num_groups)]
    batches = batching.build_batches(groups, values, policy_version=7, max_row_tokens=limit, num_parts=num_parts)
    assert sum(b.num_tokens for b in batches) == sum(g.num_tokens for g in groups)
    for b, part in zip(batches, parts, strict=True):
        for row in b.rows:
            for sid in np.unique(row.sequence_ids):
                here = row.sequence_ids == sid
                g, i = part[sid]
                prompt, answer = groups[g].prompt.token_ids, groups[g].samples[i]
                assert row.token_ids[here].tolist() == [*prompt, *answer.token_ids]
                assert row.position_ids[here].tolist() == list(range(here.sum()))
                trained = here & row.loss_mask
                np.testing.assert_array_equal(row.rollout_logprobs[trained], answer.rollout_logprobs)
                np.testing.assert_array_equal(row.policy_versions[trained], answer.policy_versions)
                assert set(row.advantages[trained]) == {g * 10.0 + i}
                assert b.sequence_lengths[sid] == answer.num_tokens


def test_parts_are_balanced_by_tokens() -> None:
    groups = [group(sample(1.0, segment(n)), prompt_tokens=1) for n in (90, 10, 80, 20)]
    parts = batching.split_parts(groups, 2)
    assert [[g for g, _ in part] for part in parts] == [[0, 1], [2, 3]]


def test_an_advantage_for_each_token_stands_at_its_token() -> None:
    groups = random_groups(np.random.default_rng(3), 3)
    values = [[np.arange(s.num_tokens) + 1000.0 * i + 100 for i, s in enumerate(group.scored)] for group in groups]
    options = {"policy_version": 7, "max_row_tokens": 30, "num_parts": 2, "pad_to_multiple": 4}
    later = batching.with_advantages(batching.build_batches(groups, **options), values)
    for batches in (batching.build_batches(groups, values, **options), later):
        found = 0
        for batch in batches:
            for row in batch.rows:
                for number in np.unique(row.sequence_ids[row.sequence_ids >= 0]).tolist():
                    g, i = batch.owners[number]
                    own, mask = row.sequence_ids == number, row.loss_mask[row.sequence_ids == number]
                    response = row.advantages[own][-len(values[g][i]) :]
                    trainable = mask[-len(values[g][i]) :]
                    np.testing.assert_array_equal(response[trainable], values[g][i][trainable].astype(np.float32))
                    assert not row.advantages[own][~mask].any()
                    found += int(trainable.sum())
        assert found == sum(batch.num_tokens for batch in batches) > 0


@given(seed=st.integers(0, 99), num_parts=st.integers(1, 4))
def test_advantages_put_in_later_and_the_kl_of_each_sample(seed, num_parts) -> None:
    groups = random_groups(np.random.default_rng(seed), 3)
    values = [np.arange(3.0) + 10 * g for g in range(3)]
    options = {"policy_version": 7, "max_row_tokens": 30, "num_parts": num_parts, "pad_to_multiple": 4}
    at_once = batching.build_batches(groups, values, **options)
    later = batching.with_advantages(batching.build_batches(groups, **options), values)
    for a, b in zip(at_once, later, strict=True):
        for x, y in zip(a.rows, b.rows, strict=True):
            np.testing.assert_array_equal(x.advantages, y.advantages)
            assert y.advantages.dtype == np.float32
    scored = [replace(b, rows=tuple(with_old(r) for r in b.rows)) for b in at_once]
    got = batching.reward_kl(scored, groups)
    for b, part in zip(scored, batching.split_parts(groups, num_parts), strict=True):
        for sid, (g, i) in enumerate(part):
            slow = 0.0
            for row in b.rows:
                for t in range(len(row.token_ids)):
                    if row.sequence_ids[t] == sid and row.loss_mask[t]:
                        slow += float(row.old_logprobs[t]) - float(row.ref_logprobs[t])
            assert got[g][i] == pytest.approx(slow, abs=1e-6)


def test_kl_from_rollout_logprobs_without_a_proximal_pass() -> None:
    groups = [group(sample(1.0, segment(2, logprob=-1.0)), sample(0.0), prompt_tokens=1)]
    (batch,) = batching.build_batches(groups, [np.zeros(2)], policy_version=0, max_row_tokens=8)
    row = replace(batch.rows[0], ref_logprobs=np.array([99.0, -1.5, -3.0], np.float32))
    assert batching.reward_kl([replace(batch, rows=(row,))], groups)[0].tolist() == [2.5, 0.0]


def test_a_token_from_the_future_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="version 3"):
        batching.build_batches([group(sample(1.0, segment(1, 3)))], [np.zeros(1)], policy_version=2, max_row_tokens=8)


def test_supervised_sequence() -> None:
    mask = np.array([False, False, True, False, True])
    sequence = batching.supervised_sequence(np.arange(5, 10), mask)
    assert sequence.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert sequence.loss_mask.tolist() == mask.tolist()
    assert sequence.policy_versions.tolist() == [-1, -1, 0, -1, 0]
    batch = batching.build_batch([sequence], policy_version=0, max_row_tokens=16)
    assert batch.num_tokens == 2
    with pytest.raises(AssertionError, match="first token"):
        batching.supervised_sequence(np.arange(2), np.array([True, True]))


def test_a_huge_group_does_not_take_the_others_out_of_its_part() -> None:
    """Optimizer steps have equal numbers of groups first, equal tokens second."""
    groups = [group(sample(1.0, segment(n)), prompt_tokens=1) for n in (90, 1, 1, 1)]
    assert [len(part) for part in batching.split_parts(groups, 2)] == [2, 2]
