"""All trainer ranks as one trainer: rows are spread over the ranks, results are those of the global batch.

Rows carry the denominators of the whole batch, so a rank needs to know nothing about the others' rows; the ranks
exchange gradients among themselves. Called by ``run`` through
:class:`~rlpost.workers.cluster.workers.ClusterWorkers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.train.protocol import Objective, UpdateResult
from rlpost.types import PackedRow, TrainBatch
from rlpost.workers.cluster.files import Call, Courier

ATTENTION_FLOP_SHARE = 12  # a token's attention over n tokens costs as much as its matrices at n = 12 x hidden size


class TrainerGroup:
    """Implements ``train.protocol.PolicyTrainer`` over ``world`` ranks.

    Args:
        call: calls a method of every worker; see ``workers.cluster.actors.Actors.call``.
        hidden_size: of the model; 0 excludes attention from a row's cost.
        courier: carries files if ranks share no storage with this process; None if they do.
    """

    def __init__(self, call: Call, *, world: int, hidden_size: int, courier: Courier | None = None) -> None:
        self._call, self._world, self._hidden_size, self._courier = call, world, hidden_size, courier

    def update(self, batch: TrainBatch, objective: Objective) -> UpdateResult:
        parts = split_rows(batch.rows, self._world, self._hidden_size)
        per_rank = [(replace(batch, rows=tuple(batch.rows[i] for i in part)), objective) for part in parts]
        results: list[UpdateResult] = self._call("update", per_rank=per_rank)
        assert len({r.applied for r in results}) == 1, "ranks disagree about whether the update was applied"
        return results[0]

    def logprobs(self, rows: Sequence[PackedRow], *, reference: bool = False) -> list[Any]:
        parts = split_rows(rows, self._world, self._hidden_size)
        per_rank = [([rows[i] for i in part], reference) for part in parts]
        values: list[Any] = [None] * len(rows)
        for part, of_rank in zip(parts, self._call("logprobs", per_rank=per_rank), strict=True):
            for i, value in zip(part, of_rank, strict=True):
                values[i] = value
        return values

    def save(self, folder: Path) -> None:
        self._write("save", folder)

    def load(self, folder: Path) -> None:
        if self._courier is None:
            self._call("load", folder.absolute())
            return
        self._courier.bring(folder)
        self._call("load", per_rank=[(own,) for own in self._courier.folders()])
        self._courier.clear()

    def export(self, folder: Path) -> None:
        self._write("export", folder)

    def save_config(self, folder: Path) -> None:
        self._write("save_config", folder)

    def _write(self, method: str, folder: Path) -> None:
        if self._courier is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._call(method, folder.absolute())
            return
        self._courier.clear()
        self._call(method, per_rank=[(own,) for own in self._courier.folders()])
        self._courier.fetch(folder)

    def close(self) -> None:
        """The workers close their ranks themselves."""


def row_cost(row: PackedRow, hidden_size: int) -> float:
    """Work of a row in tokens: n for a sequence of n tokens, plus its attention, which grows with n squared.

    A layer's matrices take about 24 h^2 operations per token (h: hidden size), causal attention over n tokens 2 n h on
    average; their ratio is n / (12 h).
    """
    lengths = np.bincount(row.sequence_ids[row.sequence_ids >= 0])
    quadratic = (lengths.astype(np.float64) ** 2).sum() / (ATTENTION_FLOP_SHARE * hidden_size) if hidden_size else 0.0
    return float(lengths.sum() + quadratic)


def split_rows(rows: Sequence[PackedRow], world: int, hidden_size: int) -> list[list[int]]:
    """Indices of each rank's rows: the costliest first, each to the rank with the least work so far.

    No rank gets more than the mean plus one row's cost; order within a rank is that of ``rows``.
    """
    costs = [row_cost(row, hidden_size) for row in rows]
    loads = [0.0] * world
    parts: list[list[int]] = [[] for _ in range(world)]
    for i in sorted(range(len(rows)), key=lambda i: (-costs[i], i)):
        rank = min(range(world), key=lambda r: (loads[r], r))
        parts[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(part) for part in parts]
