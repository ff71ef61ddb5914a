"""Whatever a user's reward function does becomes a number or a named failure."""

import sys

import numpy as np
import pytest

from rlpost.config import RewardConfig
from rlpost.rewards.functions import load_functions
from rlpost.rewards.result_cache import RewardResultCache
from rlpost.rewards.scoring import InlineScorer, RewardScorer
from rlpost.rewards.worker_pool import InlineCalls
from rlpost.types import Prompt


def judge(function):
    scorer = InlineScorer(function, decode=lambda parts: "x" * sum(map(len, parts)))
    prompt = Prompt(uid="0:0", token_ids=np.array([1], np.int32), text="?", reference="3")
    scorer.submit(prompt, 2, [np.array([5, 6], np.int32)], "stop")
    (verdict,) = scorer.poll()
    assert (verdict.uid, verdict.index) == ("0:0", 2) and scorer.poll() == []
    return verdict


def test_a_number_is_the_reward_and_a_failure_is_never_a_zero():
    assert judge(lambda response, **_: len(response)).reward == 2.0
    for wrong, why in ((lambda response, **_: "good", "ValueError"), (lambda response: response["x"], "TypeError")):
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


# ---- several functions, groups, retries ----------------------------------------------------------------------------


def scorer_of(functions=None, *, group_size=1, retries=0, cache=None, **settings):
    """A scorer of functions called in this process; token ids are characters."""
    specs = {name: {"function": spec} if callable(spec) else spec for name, spec in (functions or {}).items()}
    cfg = RewardConfig(function=None, functions=specs, workers=0, **settings)
    calls = InlineCalls(load_functions(cfg, "answer"))
    return RewardScorer(calls, text_of, group_size=group_size, retries=retries, cache=cache)


def text_of(parts):
    return "".join(map(chr, np.concatenate(parts)))


def submit(scorer, text, *, uid="0:0", index=0, **columns):
    prompt = Prompt(uid=uid, token_ids=np.array([1], np.int32), text="?", reference="3", columns=columns)
    scorer.submit(prompt, index, [np.array([ord(c) for c in text], np.int32)], "stop")


def test_weighted_parts_add_up_and_each_is_named():
    scorer = scorer_of(
        {
            "right": {"function": lambda response, **_: {"reward": 0.5, "accuracy": 1.0, "shown": 0.2}, "weight": 2},
            "short": {"function": lambda response, **_: -len(response), "weight": 0.1},
            "other": {"function": lambda response, **_: {"accuracy": 0.0}, "weight": 0},
        }
    )
    submit(scorer, "abc")
    (verdict,) = scorer.poll()
    assert verdict.reward == pytest.approx(2 * 0.5 - 0.3)
    assert verdict.parts == {"right": 0.5, "accuracy": 1.0, "right.shown": 0.2, "short": -3.0, "other": 0.0}


def test_a_function_without_an_opinion_leaves_it_to_the_others_and_one_that_fails_does_not():
    def fails_on_x(response, **_):
        if "x" in response:
            raise ValueError("x")
        return 1.0

    scorer = scorer_of({"a": lambda response, **_: None, "b": fails_on_x})
    submit(scorer, "fine")
    submit(scorer, "x", index=1)
    fine, failed = scorer.poll()
    assert (fine.reward, fine.parts) == (1.0, {"b": 1.0})
    assert failed.reward is None and failed.failure == "reward_error: ValueError: x" and failed.parts == {}


def test_a_group_function_waits_for_the_whole_group_in_the_order_of_indices():
    seen = []

    def rank(responses, **_):
        seen.append(responses)
        return [float(len(r)) for r in responses]

    scorer = scorer_of({"rank": rank, "alone": lambda response, **_: 10.0}, group_size=3)
    submit(scorer, "aaa", index=2)
    submit(scorer, "b", uid="0:1", index=0)
    submit(scorer, "a", index=0)
    assert scorer.poll() == [] and scorer.num_pending == 3 and scorer.drain(0.0), "nothing can come before the rest"
    submit(scorer, "aa", index=1)
    verdicts = {v.index: v.reward for v in scorer.poll()}
    assert verdicts == {0: 11.0, 1: 12.0, 2: 13.0} and seen == [["a", "aa", "aaa"]]
    assert scorer.num_pending == 1


def test_a_call_in_this_process_may_be_made_again_however_often():
    def always_fails(response, **_):
        raise ValueError("no")

    scorer = scorer_of({"r": always_fails}, retries=2000)
    submit(scorer, "x")
    (verdict,) = scorer.poll()
    assert verdict.failure == "reward_error: ValueError: no" and scorer.num_pending == 0
    assert scorer.take_counts().retried == 2000


def test_a_failed_call_is_made_again_as_often_as_the_policy_says():
    left = {"flaky": 2, "never": 99}

    def reward(response, **_):
        left[response] -= 1
        if left[response] >= 0:
            raise OSError("busy")
        return 1.0

    scorer = scorer_of({"r": reward}, retries=2)
    submit(scorer, "flaky")
    submit(scorer, "never", index=1)
    flaky, never = scorer.poll()
    assert flaky.reward == 1.0 and never.failure == "reward_error: OSError: busy"
    counts = scorer.take_counts()
    assert (counts.calls, counts.retried) == (6, 4) and scorer.take_counts().calls == 0


def test_training_and_evaluation_never_get_each_others_verdicts():
    calls = InlineCalls(load_functions(RewardConfig(function=lambda response, **_: len(response), workers=0)))
    training, evaluation = (RewardScorer(calls, text_of) for _ in range(2))
    submit(training, "a")
    submit(evaluation, "bb")
    assert [v.reward for v in evaluation.poll()] == [2.0] and evaluation.num_pending == 0
    assert training.num_pending == 1 and [v.reward for v in training.poll()] == [1.0]


def test_no_opinion_anywhere_is_a_failure_of_its_own_kind():
    scorer = scorer_of({"a": lambda completions: [None], "b": lambda response: None})
    submit(scorer, "x")
    assert scorer.poll()[0].failure == "none: no function of the reward gave a result"


def test_evaluation_on_the_same_scorer_has_its_own_group_size():
    calls = InlineCalls(load_functions(RewardConfig(function=lambda responses: [1.0] * len(responses), workers=0)))
    training, evaluation = RewardScorer(calls, text_of, group_size=3), RewardScorer(calls, text_of, group_size=1)
    submit(training, "a")
    submit(evaluation, "a")
    assert not training.poll() and evaluation.poll()


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path):
    """Makes scorers that share a cache; ``calls`` counts what really was asked. The file is as a restart finds it."""

    class Counted:
        said = []
        calls = []

        def scorer(self, version="1", cacheable=True, retries=0):
            def reward(response, *, columns, **_):
                self.calls.append(response)
                if response == "bad":
                    raise ValueError("no")
                return None if response == "none" else {"reward": len(response), "accuracy": 1.0}

            reward.version, reward.cacheable = version, cacheable
            cache = RewardResultCache(tmp_path / "cache", self.said.append)
            return scorer_of({"r": reward}, cache=cache)

    return Counted()


def test_a_verdict_is_paid_for_once(counted):
    first = counted.scorer()
    submit(first, "abc")
    (paid,) = first.poll()
    second = counted.scorer()
    submit(second, "abc", uid="eval:7", index=3)
    (known,) = second.poll()
    assert (known.uid, known.index, known.reward, known.parts) == ("eval:7", 3, paid.reward, paid.parts)
    assert counted.calls == ["abc"]
    counts = second.take_counts()
    assert (counts.calls, counts.cache_lookups, counts.cache_hits) == (0, 1, 1) and counted.said == []


def test_another_response_column_or_version_is_another_question(counted):
    scorer = counted.scorer()
    for text, columns in (("abc", {}), ("abd", {}), ("abc", {"level": 1}), ("abc", {})):
        submit(scorer, text, **columns)
    assert len(counted.calls) == 3
    submit(counted.scorer(version="2"), "abc")
    assert len(counted.calls) == 4
    submit(counted.scorer(cacheable=False), "abc")
    assert len(counted.calls) == 5


def test_failures_and_missing_opinions_are_asked_again(counted):
    for _ in range(2):
        scorer = counted.scorer()
        submit(scorer, "bad")
        submit(scorer, "none", index=1)
        assert all(v.reward is None for v in scorer.poll())
    assert counted.calls == ["bad", "none", "bad", "none"]


def test_a_damaged_cache_is_replaced_and_an_unusable_one_is_said_and_left_out(tmp_path, counted):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "verdicts.sqlite").write_bytes(b"no database at all, but long enough to be read" * 100)
    scorer = counted.scorer()
    submit(scorer, "abc")
    submit(counted.scorer(), "abc")
    assert counted.calls == ["abc"] and counted.said == []
    said = []
    (tmp_path / "file").write_text("")
    cache = RewardResultCache(tmp_path / "file", said.append)
    assert cache.get("k") is None and len(said) == 1 and "continuing without it" in said[0]
    cache.put([("k", [])])
    cache.close()
    assert len(said) == 1
