"""Metrics over rows and ranks: sums over counts, and maxima."""

import math

import torch

from rlpost.train.metric_sums import merge, to_floats, values


def test_sums_counts_and_maxima():
    rows = [
        {"loss/kl": (torch.tensor(3.0), 2), "loss/ratio/max": (torch.tensor(1.5), 1)},
        {"loss/kl": (1.0, torch.tensor(6)), "loss/ratio/max": (-2.0, 4)},
    ]
    assert values(merge(to_floats(rows))) == {"loss/kl": 0.5, "loss/ratio/max": 1.5}


def test_merging_ranks_equals_merging_rows():
    rows = to_floats([{"a": (i, i + 1), "b/max": (-i, 1)} for i in range(6)])
    assert merge(rows) == merge([merge(rows[:2]), merge(rows[2:]), {}])


def test_nothing_counted_has_no_value():
    assert values(merge(to_floats([{"a": (0.0, 0), "b/max": (-math.inf, 0)}, {"a": (4.0, 2)}]))) == {"a": 2.0}
    assert values(merge([])) == {}


def test_nan_is_not_hidden_by_a_maximum():
    for order in ((math.nan, 1.0), (1.0, math.nan)):
        assert math.isnan(values(merge({"a/max": (v, 1)} for v in order))["a/max"])
