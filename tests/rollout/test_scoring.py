"""Whatever a user's reward function does becomes a number or a named failure."""

import sys

import numpy as np
import pytest

from rlpost.rollout.scoring import InlineScorer
from rlpost.types import Prompt


def judge(function):
    scorer = InlineScorer(function, decode=lambda ids: "x" * len(ids))
    prompt = Prompt(uid="0:0", token_ids=np.array([1], np.int32), text="?", reference="3")
    scorer.submit(prompt, 2, np.array([5, 6], np.int32), "stop")
    (verdict,) = scorer.poll()
    assert (verdict.uid, verdict.index) == ("0:0", 2) and scorer.poll() == []
    return verdict


def test_a_number_is_the_reward_and_a_failure_is_never_a_zero():
    assert judge(lambda response, **_: len(response)).reward == 2.0
    for wrong, why in ((lambda response, **_: "good", "ValueError"), (lambda: 1.0, "TypeError")):
        verdict = judge(wrong)
        assert verdict.reward is None and verdict.failure.startswith(f"reward_error: {why}")


def test_a_failure_is_one_line():
    def two_lines(response, **_):
        raise ValueError("one\ntwo")

    assert judge(two_lines).failure == "reward_error: ValueError: one two"


def test_code_under_judgement_that_calls_exit_does_not_end_the_run():
    verdict = judge(lambda response, **_: sys.exit(0))
    assert verdict.reward is None and verdict.failure == "reward_error: SystemExit: 0"


def test_ctrl_c_inside_a_reward_is_no_failed_reward():
    def interrupted(response, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(interrupted)
