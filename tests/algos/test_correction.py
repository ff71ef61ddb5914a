"""Behaviour correction: hand-worked weights, and the statistics by version lag."""

from __future__ import annotations

import math

import pytest
import torch

from rlpost.algos import correction
from tests.algos.making import tensor_row

RATIOS = [0.25, 1.0, 4.0, 0.25]  # two sequences: (0.25, 1, 4) with geometric mean 1, and (0.25)
LOG_RATIOS = torch.tensor([math.log(r) for r in RATIOS], dtype=torch.float64)


@pytest.mark.parametrize(
    ("part", "weights", "changed"),
    [
        (correction.none, [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]),
        (correction.token_truncate, [0.25, 1.0, 2.0, 0.25], [0, 0, 1, 0]),
        (correction.token_mask, [0.0, 1.0, 0.0, 0.0], [1, 0, 1, 1]),
        (correction.sequence_truncate, [1.0, 1.0, 1.0, 0.25], [0, 0, 0, 0]),
        (correction.sequence_mask, [1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1]),
    ],
)
def test_by_hand(part, weights, changed) -> None:
    row, _ = tensor_row([{"advantages": [1.0] * 3}, {"advantages": [1.0]}])
    got, touched = part(LOG_RATIOS, row, floor=0.5, cap=2.0)
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64))
    assert touched.tolist() == [bool(c) for c in changed]


def test_bounds_are_inside_and_sequences_can_be_truncated() -> None:
    row, _ = tensor_row([{"advantages": [1.0, 1.0]}])
    log_ratio = torch.tensor([math.log(0.5), math.log(2.0)], dtype=torch.float64)
    assert not correction.token_mask(log_ratio, row, floor=0.5, cap=2.0)[1].any()
    weight, changed = correction.sequence_truncate(log_ratio + 1, row, floor=0.5, cap=2.0)
    assert weight.tolist() == [2.0, 2.0] and changed.all()


def test_sequence_means_leave_masked_tokens_out() -> None:
    row, _ = tensor_row([{"advantages": [0.0, 1.0, 1.0], "mask": [False, True, True]}])
    log_ratio = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)
    weight, _ = correction.sequence_truncate(log_ratio, row, floor=0.5, cap=2.0)
    torch.testing.assert_close(weight, torch.full((3,), math.exp(0.3), dtype=torch.float64))


def test_tokens_with_a_mixed_kv_cache_are_in_no_lag() -> None:
    spec = {"advantages": [1.0] * 4, "versions": [0, 0, 0, -1], "mixed_kv": [False, True, True, True]}
    row, _ = tensor_row([spec | {"mask": [True, True, False, True]}])
    stats = correction.statistics(torch.tensor([0.1, 0.5, 9.0, 0.7], dtype=torch.float64), row.loss_mask, row)
    values = {name: (float(total), float(count)) for name, (total, count) in stats.items()}
    assert values["mismatch/lag_0/abs_log_ratio"] == pytest.approx((0.1, 1))
    assert values["mismatch/lag_1/abs_log_ratio"] == (0, 0)
    assert values["mismatch/mixed_kv/abs_log_ratio"] == pytest.approx((1.2, 2))
    assert values["mismatch/mixed_kv/token_share"] == pytest.approx((2, 3))
    assert values["mismatch/abs_log_ratio/max"][0] == pytest.approx(0.7)


def test_statistics_by_lag() -> None:
    spec = {"advantages": [1.0] * 6, "versions": [0, 0, -1, -8, -20, 0], "mask": [True] * 5 + [False]}
    row, _ = tensor_row([spec])
    log_ratio = torch.tensor([0.1, -0.3, 0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    changed = torch.tensor([False, True, False, True, True, False])
    stats = correction.statistics(log_ratio, changed, row)

    def value(name: str) -> float:
        total, count = stats[name]
        return float(total / count)

    assert value("mismatch/lag_0/abs_log_ratio") == pytest.approx(0.2)
    assert value("mismatch/lag_0/ratio") == pytest.approx((math.exp(0.1) + math.exp(-0.3)) / 2)
    assert value("mismatch/lag_0/changed_share") == 0.5
    assert value("mismatch/lag_0/token_share") == pytest.approx(2 / 5)
    assert value("mismatch/lag_1/abs_log_ratio") == 0.5
    assert value("mismatch/lag_8_plus/abs_log_ratio") == 1.5
    assert stats["mismatch/lag_8_plus/ratio"][1] == 2
    assert stats["mismatch/lag_3/ratio"][1] == 0  # nobody: the name is there on every row, with count 0
    assert stats["mismatch/abs_log_ratio/max"][0] == 2.0
