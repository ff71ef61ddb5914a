"""GDPO: the paper's collapsed example, a second formula, one function, missing opinions, and the way from a config."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.algos import advantages as adv
from rlpost.algos.advantages import FunctionRewards
from rlpost.algos.algorithm import build_algorithm
from rlpost.config import AlgoConfig, Config, RewardConfig, RolloutConfig
from rlpost.rewards.selection import list_weights
from rlpost.types import Sample
from tests.algos.making import group, segment

EPS = 1e-4


def functions_of(*rewards_by_function, weights=None) -> list[FunctionRewards]:
    """Each: a list of groups of rewards, None for no opinion."""
    weights = weights or [1.0] * len(rewards_by_function)
    return [
        FunctionRewards(f"f{number}", weight, [np.array(rewards, np.float64) for rewards in groups])
        for number, (groups, weight) in enumerate(zip(rewards_by_function, weights, strict=True))
    ]


def sums_of(functions) -> list[np.ndarray]:
    return [sum(f.weight * np.nan_to_num(f.groups[g]) for f in functions) for g in range(len(functions[0].groups))]


def test_the_collapsed_example_of_the_paper() -> None:
    """Two binary rewards, two samples: GRPO sees no difference between fulfilling one and fulfilling both."""
    one, both = [[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]
    first, second = one, both  # the second reward differs in the second group only
    functions = functions_of(first, second)
    sums = sums_of(functions)
    assert [s.tolist() for s in sums] == [[0, 1], [0, 2]]
    collapsed = adv.grpo(sums, eps=0.0)
    np.testing.assert_allclose(collapsed[0], collapsed[1])
    apart = adv.gdpo(sums, eps=0.0, functions=functions)
    # Within a group each binary reward becomes -1/sqrt 2, 1/sqrt 2: sums of one and of two of them.
    assert apart[1][1] == pytest.approx(2 * apart[0][1]) and apart[0][1] > 0
    # The batch -a, a, -2a, 2a has the variance 10 a^2 / 3.
    np.testing.assert_allclose(np.concatenate(apart), np.array([-1, 1, -2, 2]) / np.sqrt(10 / 3))


def normalize_then_sum(functions, eps: float) -> list[list[float]]:
    """The formula as TRL has it: NaN-aware moments per function and group, sum, then the batch's mean and std."""
    totals = []
    for g in range(len(functions[0].groups)):
        total = np.zeros(len(functions[0].groups[g]))
        for f in functions:
            values = f.groups[g]
            known = values[~np.isnan(values)]
            if len(known) > 1:
                std = np.sqrt(((known - known.mean()) ** 2).sum() / (len(known) - 1))
                total += np.nan_to_num(f.weight * (values - known.mean()) / (std + eps))
        totals.append(total)
    batch = np.concatenate(totals)
    std = np.sqrt(((batch - batch.mean()) ** 2).sum() / (len(batch) - 1)) if len(batch) > 1 else 0.0
    return [((total - batch.mean()) / (std + eps)).tolist() for total in totals]


reward = st.one_of(st.none(), st.floats(-3, 3).map(lambda x: round(x, 1)))


@given(
    rewards=st.integers(1, 3).flatmap(
        lambda count: st.lists(
            st.lists(st.tuples(*[reward] * count), min_size=1, max_size=5), min_size=1, max_size=4
        ).map(lambda groups: [[[row[k] for row in g] for g in groups] for k in range(count)])
    ),
    weights=st.tuples(*[st.floats(-2, 2)] * 3),
)
def test_against_the_second_formula(rewards, weights) -> None:
    functions = functions_of(*rewards, weights=list(weights[: len(rewards)]))
    got = adv.gdpo(sums_of(functions), eps=EPS, functions=functions)
    for values, expected in zip(got, normalize_then_sum(functions, EPS), strict=True):
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected, atol=1e-9)


def test_one_function_is_grpo_up_to_the_batch() -> None:
    groups = [[1.0, 0.0, 0.0], [0.2, 0.5, 0.9], [1.0, 1.0, 1.0]]
    (function,) = functions_of(groups, weights=[3.0])
    plain = np.concatenate(adv.grpo(groups, eps=0.0))
    got = np.concatenate(adv.gdpo(groups, eps=0.0, functions=[function]))
    np.testing.assert_allclose(got, plain / plain.std(ddof=1))


def test_a_scale_does_not_matter_and_a_weight_does() -> None:
    first, second = [[1.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 1.0]]
    plain = adv.gdpo(first, eps=0.0, functions=functions_of(first, second))
    hundredfold = [[100 * r for r in second[0]]]
    np.testing.assert_allclose(adv.gdpo(first, eps=0.0, functions=functions_of(first, hundredfold)), plain)
    (tilted,) = adv.gdpo(first, eps=0.0, functions=functions_of(first, second, weights=[1.0, 0.25]))
    assert tilted[0] > 0 > tilted[2] and plain[0][0] == pytest.approx(plain[0][2])
    (alone,) = adv.gdpo(first, eps=0.0, functions=functions_of(first, second, weights=[1.0, 0.0]))
    np.testing.assert_allclose(alone, adv.gdpo(first, eps=0.0, functions=functions_of(first))[0])


def test_no_opinion_is_left_out_and_counts_as_the_mean() -> None:
    right, style = [[1.0, 0.0, 1.0, 0.0]], [[None, None, 4.0, 2.0]]
    (values,) = adv.gdpo(right, eps=0.0, functions=functions_of(right, style))
    (alone,) = adv.gdpo(right, eps=0.0, functions=functions_of(right))
    assert values[0] / values[1] == pytest.approx(alone[0] / alone[1])
    assert values[2] > values[0] > values[1] > values[3] and sum(values) == pytest.approx(0)
    # One opinion has nothing to compare with, and none at all is none.
    for missing in ([[None, None, 4.0, None]], [[None] * 4]):
        np.testing.assert_allclose(adv.gdpo(right, eps=0.0, functions=functions_of(right, missing))[0], alone)


def test_equal_rewards_empty_groups_and_groups_of_one_give_exactly_zero() -> None:
    equal = functions_of([[0.1] * 3, [], [0.7]], [[2.0] * 3, [], [0.0]])
    assert [v.tolist() for v in adv.gdpo([[1] * 3, [], [1]], eps=0.0, functions=equal)] == [[0.0] * 3, [], [0.0]]
    mixed = functions_of([[0.1] * 3, [0.3, 0.7, 0.2]], [[1.1] * 3, [0.0, 1.0, 0.0]])
    first, second = adv.gdpo([[1] * 3, [1, 2, 1]], eps=0.0, functions=mixed)
    assert (first == 0).all() and second.any(), "a group without a signal takes none from the batch"
    assert adv.gdpo([], eps=0.0, functions=functions_of([], [])) == []


def test_from_the_configuration_to_advantages() -> None:
    """Parts and weights reach the estimator; a failed sample is left out, one without an opinion is not."""
    spec = {"right": {"function": "math"}, "form": {"function": "format_match", "weight": 0.5}}
    cfg = Config(
        algo=AlgoConfig(advantage="gdpo", advantage_eps=0.0),
        rollout=RolloutConfig(max_response_tokens=100),
        reward=RewardConfig(function=None, functions=spec),
    )
    algorithm = build_algorithm(cfg, list_weights(cfg.reward))

    def made(index, parts, failure=None) -> Sample:
        total = None if failure else parts.get("right", 0) + 0.5 * parts.get("form", 0)
        return Sample(
            uid="0:0",
            index=index,
            segments=(segment(3),),
            finish_reason="stop",
            reward=total,
            reward_parts=parts,
            failure=failure,
        )

    one = group(
        made(0, {"right": 1.0, "form": 0.0, "accuracy": 1.0}),
        made(1, {}, failure="timeout: late"),
        made(2, {"right": 0.0, "form": 1.0}),
        made(3, {"right": 0.0}),
    )
    (got,) = algorithm.advantages([one])
    functions = [
        FunctionRewards("right", 1.0, [np.array([1.0, 0.0, 0.0])]),
        FunctionRewards("form", 0.5, [np.array([0.0, 1.0, np.nan])]),
    ]
    np.testing.assert_array_equal(got, adv.gdpo([[1, 0.5, 0]], eps=0.0, functions=functions)[0])
    assert len(got) == 3 and got[2] < 0


def test_a_single_unnamed_function() -> None:
    cfg = Config(algo=AlgoConfig(advantage="gdpo"), rollout=RolloutConfig(max_response_tokens=100))
    algorithm = build_algorithm(cfg, list_weights(cfg.reward))
    samples = [
        Sample(uid="0:0", index=i, segments=(segment(1),), finish_reason="stop", reward=r, reward_parts={"length": 9.0})
        for i, r in enumerate([1.0, 0.0])
    ]
    (got,) = algorithm.advantages([group(*samples)])
    assert got[0] == pytest.approx(-got[1]) and got[0] > 0


def test_the_weights_of_another_reward_are_noticed() -> None:
    cfg = Config(reward=RewardConfig(function=None, functions={"right": {"function": "math"}}))
    with pytest.raises(AssertionError, match="another reward"):
        build_algorithm(cfg)
