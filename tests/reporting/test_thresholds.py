"""The borders have one home: what docs/metrics.md calls healthy names the same numbers as the report draws."""

from __future__ import annotations

import re

import pytest

from rlpost.reporting import thresholds
from rlpost.reporting.metric_names import find


@pytest.mark.parametrize(("dtype", "position"), [("float32", 0), ("bfloat16", 1)])
def test_the_registry_tells_the_borders_of_the_report(dtype: str, position: int) -> None:
    drawn = thresholds.borders({"model": {"dtype": dtype}, "rollout": {"max_staleness": 3}})
    assert drawn.pop("rollout/buffer_age") == 3 and "max_staleness" in find("rollout/buffer_age").healthy
    assert len(drawn) == 4
    for name, border in drawn.items():
        words = re.sub("lag_0|fp32|bf16", "", find(name).healthy)
        told = [float(number) for number in re.findall(r"\d[\d.e-]*", words)]
        assert told[position if len(told) > 1 else 0] == border, f"{name}: {find(name).healthy}"


def test_a_run_without_a_configuration_has_borders_too() -> None:
    assert "rollout/buffer_age" not in thresholds.borders({}) and "loss/approx_kl" in thresholds.borders({})
