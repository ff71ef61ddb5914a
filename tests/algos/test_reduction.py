"""Reductions: hand-worked numbers over global denominators, and masked values that are dropped, not multiplied."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlpost.algos import reduction
from tests.algos.making import tensor_row

SPECS = [{"advantages": [1.0] * 3, "mask": [False, True, True]}, {"advantages": [1.0] * 4}]
VALUES = torch.tensor([math.inf, 1.0, 3.0, 4.0, 4.0, 4.0, 8.0], dtype=torch.float64)  # sums 4 and 20, means 2 and 5


@pytest.mark.parametrize(
    ("part", "expected"),
    [(reduction.token_mean, 24 / 6), (reduction.sequence_mean, (2 + 5) / 2), (reduction.constant_length, 24 / 20)],
)
def test_by_hand_with_infinity_where_masked(part, expected) -> None:
    row, batch = tensor_row(SPECS)
    assert float(part(VALUES, row, batch, constant_length=10)) == pytest.approx(expected)


def test_denominators_are_the_global_batchs() -> None:
    """The row is one of several: 60 tokens and 20 sequences in all."""
    row, batch = tensor_row(SPECS)
    batch = replace(batch, num_tokens=60, num_sequences=20)
    assert float(reduction.token_mean(VALUES, row, batch, constant_length=10)) == pytest.approx(24 / 60)
    assert float(reduction.sequence_mean(VALUES, row, batch, constant_length=10)) == pytest.approx(7 / 20)
    assert float(reduction.constant_length(VALUES, row, batch, constant_length=10)) == pytest.approx(24 / 200)


def test_an_empty_batch_gives_zero() -> None:
    row, batch = tensor_row([{"advantages": [1.0], "mask": [False]}])
    for part in (reduction.token_mean, reduction.sequence_mean, reduction.constant_length):
        assert float(part(torch.ones(1), row, batch, constant_length=10)) == 0.0
