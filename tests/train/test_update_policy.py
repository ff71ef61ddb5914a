"""Which groups an update really trained."""

import numpy as np
import pytest

from rlpost.algos.batch import build_batches
from rlpost.errors import RunError
from rlpost.train.protocol import UpdateResult
from rlpost.train.update_policy import check_mismatch, find_untrained
from rlpost.types import Group, Prompt, Sample, Segment


def group(uid, *, tokens=3, reward=1.0):
    segment = Segment(
        token_ids=np.zeros(tokens, np.int32), rollout_logprobs=np.zeros(tokens, np.float32), policy_version=0
    )
    failure = None if reward is not None else "reward_error: x"
    samples = [Sample(uid=uid, index=i, segments=(segment,), reward=reward, failure=failure) for i in range(2)]
    return Group(uid=uid, prompt=Prompt(uid=uid, token_ids=np.zeros(2, np.int32), text=""), samples=tuple(samples))


def parts_of(groups, number):
    return build_batches(groups, policy_version=0, max_row_tokens=100, num_parts=number)


def results(*applied):
    return [UpdateResult(applied=a, loss=0.0, grad_norm=1.0, lr=1.0, metrics={}, num_tokens=6) for a in applied]


def test_a_part_is_trained_when_one_epoch_applied_it():
    groups = [group("a", tokens=4), group("b", tokens=3)]  # the larger one is the first part
    assert find_untrained(groups, parts_of(groups, 2), results(True, True)) == {}
    assert find_untrained(groups, parts_of(groups, 2), results(False, True)) == {"a": "nan_update"}
    assert find_untrained(groups, parts_of(groups, 2), results(True, False, True, False)) == {"b": "nan_update"}
    assert find_untrained(groups, parts_of(groups, 2), results(False, True, True, True)) == {}
    assert find_untrained(groups, parts_of(groups, 1), results(False)) == {"a": "nan_update", "b": "nan_update"}


def test_a_group_without_a_token_to_train_is_named_so():
    groups = [group("a"), group("b", tokens=0), group("c", reward=None)]
    assert find_untrained(groups, parts_of(groups, 1), results(True)) == {
        "b": "nothing_to_train",
        "c": "nothing_to_train",
    }
    assert find_untrained(groups[1:], parts_of(groups[1:], 1), []) == {"b": "nothing_to_train", "c": "nothing_to_train"}


def test_engine_and_trainer_that_drift_apart_are_warned_of_and_then_stop_the_run():
    assert check_mismatch(None, stop=0.5, step=3) == check_mismatch(0.05, stop=0.5, step=3) == ""
    assert "warning: step 3" in check_mismatch(0.051, stop=0.5, step=3)
    assert check_mismatch(0.5, stop=0.5, step=3).startswith("warning")
    with pytest.raises(RunError, match="drift apart"):
        check_mismatch(0.51, stop=0.5, step=3)
