"""Packs samples into rows and rows into one batch per optimizer step. NumPy only; no tensor is made here.

Whole sequences (prompt + response) are laid end to end; none is ever cut. Called by ``train.update_policy`` (rollouts)
and ``sft`` (supervised sequences). Everything is deterministic: same input, same rows in the same order, independent of
the advantages - so a batch can be built first, scored by the reference, and given its advantages afterwards.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlpost.types import Group, PackedRow, Sample, TrainBatch

Owner = tuple[int, int]  # (group index, index among the group's scored samples)
# Per group one value for each scored sample, or one array f[R] for each, with a value per response token.
Advantages = Sequence[Sequence[Any] | np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One sequence before packing. n: its tokens. Floats are 0 where ``loss_mask`` is False."""

    token_ids: np.ndarray  # i64[n]
    loss_mask: np.ndarray  # bool[n]; False at position 0, which nothing predicts
    rollout_logprobs: np.ndarray  # f32[n]
    policy_versions: np.ndarray  # i32[n]; -1 for tokens that the policy did not sample
    advantages: np.ndarray  # f32[n]
    mixed_kv: np.ndarray  # bool[n]


def build_batches(
    groups: Sequence[Group],
    advantages: Advantages | None = None,
    *,
    policy_version: int,
    max_row_tokens: int,
    num_parts: int = 1,
    pad_to_multiple: int = 1,
) -> list[TrainBatch]:
    """One batch per optimizer step: disjoint parts of the rollout, groups kept whole, balanced by tokens.

    ``advantages`` None: 0 everywhere, until :func:`with_advantages`. Only samples with a reward and at least one
    trainable token are included; each batch knows the owners of its sequences (``owners``). Parts differ by at most one
    group; with fewer groups than ``num_parts`` there are fewer batches, with none there are none.
    """
    batches = []
    for owners in split_parts(groups, num_parts):
        values = [0.0 if advantages is None else advantages[g][i] for g, i in owners]
        sequences = [_rl_sequence(groups[g], groups[g].scored[i], v) for (g, i), v in zip(owners, values, strict=True)]
        batch = build_batch(
            sequences, policy_version=policy_version, max_row_tokens=max_row_tokens, pad_to_multiple=pad_to_multiple
        )
        batches.append(replace(batch, owners=tuple(owners)))
    return batches


def build_batch(
    sequences: Sequence[TrainSequence], *, policy_version: int, max_row_tokens: int, pad_to_multiple: int = 1
) -> TrainBatch:
    """All sequences in one batch; sequence ids are their indices here."""
    lengths = [len(s.token_ids) for s in sequences]
    trainable = np.array([int(s.loss_mask.sum()) for s in sequences], np.int64)
    rows = [_row(ids, sequences, pad_to_multiple) for ids in pack(lengths, max_row_tokens)]
    newest = max((int(s.policy_versions.max(initial=-1)) for s in sequences), default=-1)
    assert newest <= policy_version, f"a token of version {newest} cannot train version {policy_version}"
    return TrainBatch(
        rows=tuple(rows),
        num_tokens=int(trainable.sum()),
        num_sequences=int((trainable > 0).sum()),
        sequence_lengths=trainable,
        policy_version=policy_version,
    )


def supervised_sequence(token_ids: np.ndarray, loss_mask: np.ndarray, *, policy_version: int = 0) -> TrainSequence:
    """Tokens i[n], and which of them are targets for ``objective.nll``: bool[n], False at position 0."""
    assert not loss_mask[:1].any(), "nothing predicts the first token of a sequence"
    zeros = np.zeros(len(token_ids), np.float32)
    return TrainSequence(
        token_ids=token_ids.astype(np.int64),
        loss_mask=loss_mask.astype(np.bool_),
        rollout_logprobs=zeros,
        policy_versions=np.where(loss_mask, policy_version, -1).astype(np.int32),
        advantages=zeros,
        mixed_kv=np.zeros(len(token_ids), np.bool_),
    )


def pack(lengths: Sequence[int], max_row_tokens: int) -> list[list[int]]:
    """Indices by row, best fit decreasing: the longest first, each into the fullest row it still fits in.

    A sequence longer than ``max_row_tokens`` gets its own row. Uses at most 11/9 of the minimum number of rows, plus
    one.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fit = bisect.bisect_left(room, (length, -1))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = max(max_row_tokens, length), len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (left - length, row))
    return rows


def split_parts(groups: Sequence[Group], num_parts: int) -> list[list[Owner]]:
    """Which samples go into which optimizer step; a sample's index in its part is its sequence id there.

    The largest group first, each to the part with the fewest tokens so far that may still take a group; within a
    part, groups keep their order.
    """
    places = [[(g, i) for i, s in enumerate(group.scored) if s.trainable.any()] for g, group in enumerate(groups)]
    filled = [g for g, of_group in enumerate(places) if of_group]
    tokens = {g: _group_tokens(groups[g], places[g]) for g in filled}
    num_parts = max(num_parts, 1)
    smallest, num_larger = divmod(len(filled), num_parts)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for g in sorted(filled, key=lambda g: (-tokens[g], g)):
        larger = sum(len(part) > smallest for part in parts)
        limit = smallest + (larger < num_larger)
        open_parts = [p for p in range(num_parts) if len(parts[p]) < limit]
        target = min(open_parts, key=lambda p: (loads[p], p))
        parts[target].append(g)
        loads[target] += tokens[g]
    return [[place for g in sorted(part) for place in places[g]] for part in parts if part]


def with_advantages(batches: Sequence[TrainBatch], advantages: Advantages) -> list[TrainBatch]:
    """The same batches (of :func:`build_batches`) with these advantages, one value per sample or per response token."""
    return [replace(b, rows=tuple(_fill_advantages(row, b.owners, advantages) for row in b.rows)) for b in batches]


def _fill_advantages(row: PackedRow, owners: Sequence[Owner], advantages: Advantages) -> PackedRow:
    values = np.zeros(len(row.token_ids), np.float32)
    for number in np.unique(row.sequence_ids[row.sequence_ids >= 0]).tolist():
        g, i = owners[number]
        own = np.asarray(advantages[g][i], np.float32)
        positions = np.flatnonzero(row.sequence_ids == number)
        values[positions[-len(own) :] if own.ndim else positions] = own  # the response is at the end
    return replace(row, advantages=np.where(row.loss_mask, values, np.float32(0.0)))


def reward_kl(batches: Sequence[TrainBatch], groups: Sequence[Group]) -> list[np.ndarray]:
    """Sum of k1 = old - ref logprobs over each scored sample's trainable tokens: f64[scored samples] per group.

    Rows need ``ref_logprobs``; ``old_logprobs`` are used if the trainer filled them, else ``rollout_logprobs`` (the
    distribution the tokens were drawn from). A sample without a trainable token gets 0.
    """
    sums = [np.zeros(len(group.scored)) for group in groups]
    for batch in batches:
        totals = np.zeros(len(batch.owners))
        for row in batch.rows:
            assert row.ref_logprobs is not None, "the reference has not scored this row"
            mask = row.loss_mask
            old = np.asarray(row.rollout_logprobs if row.old_logprobs is None else row.old_logprobs, np.float64)
            kl = old[mask] - np.asarray(row.ref_logprobs, np.float64)[mask]
            totals += np.bincount(row.sequence_ids[mask], weights=kl, minlength=len(totals))
        for (g, i), total in zip(batch.owners, totals, strict=True):
            sums[g][i] = total
    return sums


def response_logprobs(batches: Sequence[TrainBatch], groups: Sequence[Group]) -> list[list[np.ndarray | None]]:
    """``old_logprobs`` of each scored sample's response, extracted from the packed rows: f32[R].

    Rows need ``old_logprobs``. NaN for tokens that the policy did not sample; None for a sample that is in no row.
    """
    taken: list[list[np.ndarray | None]] = [[None] * len(group.scored) for group in groups]
    for batch in batches:
        for row in batch.rows:
            assert row.old_logprobs is not None, "the trainer has not scored this row"
            old = np.where(row.loss_mask, np.asarray(row.old_logprobs, np.float32), np.float32(np.nan))
            for number in np.unique(row.sequence_ids[row.sequence_ids >= 0]).tolist():
                g, i = batch.owners[number]
                taken[g][i] = old[row.sequence_ids == number][len(groups[g].prompt.token_ids) :]
    return taken


def _group_tokens(group: Group, places: Sequence[Owner]) -> int:
    scored = group.scored
    return sum(len(group.prompt.token_ids) + scored[i].num_tokens for _, i in places)


def _rl_sequence(group: Group, sample: Sample, advantage: Any) -> TrainSequence:
    return _sequence(
        group.prompt.token_ids,
        sample.token_ids,
        trainable=sample.trainable,
        rollout_logprobs=sample.rollout_logprobs,
        policy_versions=sample.policy_versions,
        mixed_kv=sample.mixed_kv,
        advantages=np.broadcast_to(np.asarray(advantage, np.float32), (sample.num_tokens,)),
    )


def _sequence(
    prompt_ids: np.ndarray,
    response_ids: np.ndarray,
    *,
    trainable: np.ndarray,
    rollout_logprobs: np.ndarray,
    policy_versions: np.ndarray,
    mixed_kv: np.ndarray,
    advantages: np.ndarray,
) -> TrainSequence:
    num_prompt = len(prompt_ids)
    assert num_prompt >= 1, "a response needs a prompt: nothing predicts the first token of a sequence"
    return TrainSequence(
        token_ids=np.concatenate([prompt_ids, response_ids]).astype(np.int64),
        loss_mask=np.concatenate([np.zeros(num_prompt, np.bool_), trainable]),
        rollout_logprobs=_after_prompt(num_prompt, np.where(trainable, rollout_logprobs, 0.0), 0.0, np.float32),
        policy_versions=_after_prompt(num_prompt, np.where(trainable, policy_versions, -1), -1, np.int32),
        advantages=_after_prompt(num_prompt, np.where(trainable, advantages, 0.0), 0.0, np.float32),
        mixed_kv=_after_prompt(num_prompt, trainable & mixed_kv, False, np.bool_),
    )


def _after_prompt(num_prompt: int, values: np.ndarray, fill: float, dtype: type) -> np.ndarray:
    return np.concatenate([np.full(num_prompt, fill), values]).astype(dtype)


def _row(ids: Sequence[int], sequences: Sequence[TrainSequence], pad_to_multiple: int) -> PackedRow:
    """Sequences in the order of their ids; padding is one more sequence, positions from 0, sequence id -1."""
    ids = sorted(ids)
    members = [sequences[i] for i in ids]
    lengths = [len(s.token_ids) for s in members]
    padding = -sum(lengths) % pad_to_multiple

    def joined(arrays: list[np.ndarray], fill: float, dtype: type) -> np.ndarray:
        return np.concatenate([*arrays, np.full(padding, fill)]).astype(dtype)

    return PackedRow(
        token_ids=joined([s.token_ids for s in members], 0, np.int64),
        position_ids=np.concatenate([np.arange(n) for n in [*lengths, padding]]).astype(np.int64),
        sequence_ids=joined([np.full(n, i) for i, n in zip(ids, lengths, strict=True)], -1, np.int64),
        loss_mask=joined([s.loss_mask for s in members], False, np.bool_),
        rollout_logprobs=joined([s.rollout_logprobs for s in members], 0.0, np.float32),
        policy_versions=joined([s.policy_versions for s in members], -1, np.int32),
        advantages=joined([s.advantages for s in members], 0.0, np.float32),
        mixed_kv=joined([s.mixed_kv for s in members], False, np.bool_)
        if any(s.mixed_kv.any() for s in members)
        else None,
    )
