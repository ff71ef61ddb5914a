"""How a batch's rows are spread over trainer ranks; what comes back stands where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.train.protocol import UpdateResult
from rlpost.types import PackedRow, TrainBatch
from rlpost.workers.cluster.trainer_group import TrainerGroup, row_cost, split_rows


def row(*lengths: int) -> PackedRow:
    total = sum(lengths)
    return PackedRow(
        token_ids=np.arange(total),
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        sequence_ids=np.repeat(np.arange(len(lengths)), lengths),
        loss_mask=np.ones(total, np.bool_),
        rollout_logprobs=np.zeros(total, np.float32),
        policy_versions=np.zeros(total, np.int32),
        advantages=np.zeros(total, np.float32),
    )


def test_a_long_sequence_costs_more_than_short_ones_of_as_many_tokens() -> None:
    assert row_cost(row(1200), hidden_size=100) == 1200 + 1200**2 / 1200  # its attention equals its matrices
    assert row_cost(row(*[100] * 12), hidden_size=100) == 1200 + 12 * 100**2 / 1200
    assert row_cost(row(1200), hidden_size=0) == 1200


@given(
    lengths=st.lists(st.integers(1, 400), max_size=30), world=st.integers(1, 6), hidden=st.sampled_from([0, 16, 4096])
)
def test_every_row_has_one_rank_and_no_rank_much_more_than_its_share(
    lengths: list[int], world: int, hidden: int
) -> None:
    rows = [row(n) for n in lengths]
    parts = split_rows(rows, world, hidden)
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in parts)
    costs = [row_cost(r, hidden) for r in rows]
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) <= sum(costs) / world + max(costs, default=0.0) + 1e-6
    assert all(parts) or max(map(len, parts)) <= 1, "a rank is idle only where there are fewer rows than ranks"
    assert parts == split_rows(rows, world, hidden), "every rank that works it out comes to the same"


def test_logprobs_come_back_in_the_order_of_the_rows() -> None:
    rows = [row(n) for n in (3, 9, 1, 7, 7)]

    def call(method: str, *, per_rank: list[tuple[list[PackedRow], bool]]) -> list[list[int]]:
        assert method == "logprobs" and [reference for _, reference in per_rank] == [True, True]
        return [[len(r.token_ids) for r in part] for part, _ in per_rank]

    trainer = TrainerGroup(call, world=2, hidden_size=8)
    assert trainer.logprobs(rows, reference=True) == [3, 9, 1, 7, 7]


def test_ranks_share_the_rows_and_keep_the_denominators_of_the_whole_batch() -> None:
    batch = TrainBatch(
        rows=tuple(row(n) for n in (5, 5, 4)),
        num_tokens=14,
        num_sequences=3,
        sequence_lengths=np.array([5, 5, 4]),
        policy_version=2,
    )
    seen: list[TrainBatch] = []

    def call(method: str, *, per_rank: list[tuple[TrainBatch, str]]) -> list[UpdateResult]:
        seen.extend(part for part, _ in per_rank)
        applied = [True] * len(per_rank) if method == "update" else []
        return [UpdateResult(applied=a, loss=1.0, grad_norm=1.0, lr=1.0, metrics={}, num_tokens=14) for a in applied]

    assert TrainerGroup(call, world=2, hidden_size=8).update(batch, lambda *_: None).applied  # type: ignore[arg-type,return-value]
    assert [len(part.rows) for part in seen] == [2, 1]
    assert all((part.num_tokens, part.num_sequences) == (14, 3) for part in seen)


def test_ranks_that_disagree_are_a_bug() -> None:
    batch = TrainBatch(rows=(row(2),), num_tokens=2, num_sequences=1, sequence_lengths=np.array([2]), policy_version=0)

    def call(method: str, *, per_rank: list[tuple[TrainBatch, str]]) -> list[UpdateResult]:
        return [
            UpdateResult(applied=a, loss=1.0, grad_norm=1.0, lr=1.0, metrics={}, num_tokens=2) for a in (True, False)
        ]

    with pytest.raises(AssertionError, match="disagree"):
        TrainerGroup(call, world=2, hidden_size=8).update(batch, lambda *_: None)  # type: ignore[arg-type,return-value]
