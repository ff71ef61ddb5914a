"""One rule a field: what holds, what is said, and that no field with bounds or options is left without."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.config import TrainConfig, rule_of, walk_fields
from rlpost.config.rules import Rule, check_value
from rlpost.errors import ConfigError

NUMBERS = st.integers(-3, 3) | st.floats(-3, 3)
BOUNDS = st.none() | st.integers(-2, 2)
# Keys of which any value of their type may be right.
FREE_NUMBERS = {"rollout.stop_token_ids"}  # its bound is the model's vocabulary
FREE_TEXTS = set(
    """description runs_dir resume model.path data.train.split data.eval.split data.prompt_key data.template algo.name
    engine.load_format logging.project cluster.shards_dir cluster.scratch_dir""".split()
)
GENERATORS = {"data.train.generator", "data.eval.generator", "sft.generator"}  # a user's own functions only


@given(value=NUMBERS, low=BOUNDS, above=BOUNDS, high=BOUNDS, below=BOUNDS)
def test_bounds_are_those_that_the_text_says(value, low, above, high, below) -> None:
    rule = Rule(low=low, above=above, high=high, below=below, finite=True)
    said = re.findall(r"(>=|<=|>|<) (-?\d+)", rule.expected)
    assert rule.expected == (" and ".join(f"{sign} {bound}" for sign, bound in said) or "a finite number")
    compare = {">=": value.__ge__, ">": value.__gt__, "<=": value.__le__, "<": value.__lt__}
    assert rule.holds(value) == all(compare[sign](type(value)(bound)) for sign, bound in said)


@pytest.mark.parametrize(
    ("rule", "text", "good", "bad"),
    [
        (Rule(low=1), ">= 1", [1, 1.0, 2], [0, 0.999]),
        (Rule(above=0, high=1), "> 0 and <= 1", [1e-300, 1], [0, -0.0, 1.0001]),
        (Rule(low=0, below=1), ">= 0 and < 1", [0, 0.999], [1, -1e-300]),
        (Rule(finite=True), "a finite number", [-1e308, 0, 10**400], ["1", [1.0]]),
        (Rule(choices=("a", "b", "c")), "one of a, b, c", ["a", "c"], ["", "d", "one of", 0, ["a"]]),
        (Rule(choices=(1, 2, 3)), "one of 1, 2, 3", [1, 3], [0, 4, "1", True]),
        (Rule(length=2, low=0, below=1), "2 numbers, each >= 0 and < 1", [[0, 0.5], (0.9, 0.9)], [[0.9], [0, 1], 0.5]),
        (Rule(length=2, low=0), "2 numbers, each >= 0", [[0, 7]], ["00", {1: 2}, [0, math.nan], [0, 1, 2]]),
        (Rule(table="loss"), "", ["anything", {"_target_": "their.own"}, len], []),
    ],
)
def test_what_holds_and_what_is_expected(rule, text, good, bad) -> None:
    assert rule.expected == text
    assert [value for value in good if not rule.holds(value)] == []
    assert [value for value in bad if rule.holds(value)] == []


@pytest.mark.parametrize("rule", [Rule(low=1), Rule(above=0), Rule(high=1), Rule(below=1), Rule(finite=True)])
def test_only_finite_numbers_hold(rule) -> None:
    for value in (math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf"), True, False, "1", [1]):
        assert not rule.holds(value), value
    for value in (
        None,
        np.float32(0.5) if rule.low is None else 1,
        Fraction(1, 2) if rule.low is None else np.int64(2),
    ):
        assert rule.holds(value), value


@pytest.mark.parametrize("rule", [Rule(low=1), Rule(choices=("a",)), Rule(length=2, low=0), Rule(table="loss"), Rule()])
def test_none_is_left_to_the_type(rule) -> None:
    check_value("key", None, rule)


@pytest.mark.parametrize(
    ("got", "rule", "message"),
    [
        (0, Rule(low=1), "a.b: got 0; expected >= 1; see `rlpost config --keys a.b`"),
        (0, Rule(low=1, do="use 2"), "a.b: got 0; expected >= 1; use 2"),
        (math.inf, Rule(low=1, do="use 2"), "a.b: got inf; expected a finite number >= 1; use 2"),
        (math.nan, Rule(finite=True), "a.b: got nan; expected a finite number; see `rlpost config --keys a.b`"),
        ("x", Rule(choices=("y", "z")), "a.b: got 'x'; expected one of y, z; choose one"),
        ("x", Rule(choices=("y", "z"), do="y is fast"), "a.b: got 'x'; expected one of y, z; y is fast"),
        ([1], Rule(length=2, low=0), "a.b: got [1]; expected 2 numbers, each >= 0; see `rlpost config --keys a.b`"),
    ],
)
def test_the_message_is_one_line_in_the_house_form(got, rule, message) -> None:
    with pytest.raises(ConfigError) as caught:
        check_value("a.b", got, rule)
    assert str(caught.value) == message


def test_without_a_rule_anything_holds() -> None:
    check_value("a.b", object(), None)


def test_a_rule_that_does_not_exist_is_our_own_mistake() -> None:
    with pytest.raises(TypeError):
        Rule(lowest=1)  # type: ignore[call-arg]
    with pytest.raises(AssertionError, match="gradient_checkpointing has no rule"):
        rule_of(TrainConfig, "gradient_checkpointing")


# ---- the schema ----------------------------------------------------------------------------------------------------


def test_every_number_has_a_rule() -> None:
    numeric = {key.name: key for key in walk_fields() if re.search(r"\b(int|float)\b", key.type)}
    assert len(numeric) > 75
    assert {name for name, key in numeric.items() if key.rule is None} == FREE_NUMBERS


def test_every_text_has_options_or_is_free() -> None:
    """Optional texts are names and folders that may be absent."""
    texts = {key.name: key for key in walk_fields() if key.type == "str"}
    assert {name for name, key in texts.items() if key.rule is None} == FREE_TEXTS


def test_every_part_has_a_table_or_is_a_users_own() -> None:
    parts = {key.name: key for key in walk_fields() if key.type in ("Any", "Optional[Any]")}
    assert {name for name, key in parts.items() if key.rule is None} == GENERATORS
    assert all(key.rule.table for key in parts.values() if key.rule is not None)


def test_every_default_holds() -> None:
    assert [key.name for key in walk_fields() if key.rule is not None and not key.rule.holds(key.default)] == []
