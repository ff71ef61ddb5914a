"""The table: every name resolves, and numbers that cannot work are refused before any part is imported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlpost.algos import table
from rlpost.algos.advantages import FunctionRewards
from rlpost.config import AlgoConfig, OverlongConfig, rule_of
from rlpost.errors import ConfigError
from tests.algos.making import group, sample, segment


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in table.TABLES.items() for name in names])
def test_every_name_resolves_to_its_function(kind, name) -> None:
    assert table.resolve(kind, name).__name__ == name


@pytest.mark.parametrize("kind", table.TABLES)
def test_the_schema_points_to_every_table(kind) -> None:
    assert rule_of(AlgoConfig, kind).table == kind


def test_a_group_of_one_gives_nothing_to_what_compares_its_samples() -> None:
    """Each alone gets an advantage of exactly 0, and the filter rejects it."""
    for name, part in table.ADVANTAGES.items():
        more = {"functions": [FunctionRewards("", 1.0, [np.ones(1), np.zeros(1)])]} if part.by_function else {}
        advantages = np.concatenate(table.resolve("advantage", name)([[1.0], [0.0]], eps=1e-6, **more))
        assert part.compares_group == (not advantages.any()), name
    for name, part in table.FILTERS.items():
        assert part.compares_group == (table.resolve("filter", name)(group(sample(1.0, segment(2)))) is not None), name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"advantage": "gpo"}, "algo.advantage: got 'gpo'; .*did you mean grpo"),
        ({"correction": "truncate"}, "algo.correction: .*token_truncate"),
        ({"old_logprobs": "engine"}, "algo.old_logprobs: got 'engine'; expected one of trainer, rollout"),
        ({"clip_low": 1.5}, "algo.clip_low: got 1.5"),
        ({"clip_high": -0.1}, "algo.clip_high"),
        ({"dual_clip": 1.0}, "algo.dual_clip"),
        ({"kl_coef": -1.0}, "algo.kl_coef"),
        ({"entropy_coef": float("nan")}, "algo.entropy_coef: got nan; expected a finite number"),
        ({"advantage_eps": -1.0}, "algo.advantage_eps"),
        ({"max_filtered_groups": 0}, "algo.max_filtered_groups"),
        ({"correction_floor": 3.0}, "algo.correction_floor: got 3.0; expected < algo.correction_cap = 2.0"),
        ({"correction_floor": -1.0}, "algo.correction_floor"),
        ({"correction_cap": 0.0}, "algo.correction_cap"),
        ({"constant_length": 0}, "algo.constant_length"),
        ({"overlong": OverlongConfig(buffer_tokens=101)}, r"buffer_tokens: got 101; .*max_response_tokens = 100"),
        ({"overlong": OverlongConfig(buffer_tokens=-1)}, "algo.overlong.buffer_tokens: got -1; expected >= 0"),
        ({"overlong": OverlongConfig(buffer_share=1.5)}, "buffer_share"),
        ({"overlong": OverlongConfig(penalty=-1.0)}, "penalty"),
        (
            {"advantage": "gdpo", "overlong": OverlongConfig(buffer_share=0.2)},
            "algo.overlong.buffer_share: got 0.2; expected 0 with algo.advantage=gdpo; .*one of reward.functions",
        ),
        ({"advantage": "gdpo", "overlong": OverlongConfig(buffer_tokens=5)}, "algo.overlong.buffer_tokens: got 5"),
        ({"advantage": "gdpo", "kl_coef": 0.1, "kl_estimator": "k1"}, "algo.kl_estimator: got 'k1'; .*use k2 or k3"),
    ],
)
def test_what_is_refused(change, expected) -> None:
    table.check_algo(AlgoConfig(), max_response_tokens=100)
    with pytest.raises(ConfigError, match=expected):
        table.check_algo(replace(AlgoConfig(), **change), max_response_tokens=100)


def test_what_gdpo_can_be_combined_with() -> None:
    table.check_algo(replace(AlgoConfig(), advantage="gdpo", kl_coef=0.1, kl_estimator="k3"), max_response_tokens=100)
    table.check_algo(replace(AlgoConfig(), advantage="gdpo", kl_estimator="k1"), max_response_tokens=100)
