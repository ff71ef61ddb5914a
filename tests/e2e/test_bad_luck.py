"""What goes wrong inside a run is handled, counted and shown: rewards that raise, a NaN loss, a user's own parts."""

import json

from .program import SMALL, rlpost, steps_of

PLUGIN = '''
import torch
from rlpost.algos.losses import clipped

calls = 0

def nan_at_first(logprobs, old_logprobs, advantages, row, cfg):
    loss, metrics = clipped(logprobs, old_logprobs, advantages, row, cfg)
    global calls
    calls += 1
    return (loss * float("nan") if calls == 1 else loss), metrics

def grumpy(response, *, reference, **_):
    """Raises on an eighth of the responses, by their text."""
    if sum(map(ord, response)) % 8 == 0:
        raise ValueError("not my type")
    return {"length": min(1.0, len(response) / 40), "right": float(response.endswith("#" + reference))}

def mean_only(rewards, *, eps):
    return [r - r.mean() for r in rewards]
'''


def test_a_run_with_a_users_parts_failures_and_a_nan(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    output = rlpost(
        "train",
        "recipe=math/arithmetic",
        "name=unlucky",
        "steps=4",
        "algo.loss={_target_: mine.nan_at_first}",
        "algo.advantage={_target_: mine.mean_only}",
        "reward.function=mine.grumpy",
        "algo.kl_coef=0.01",
        "algo.kl_estimator=k3",
        "train=zero2",
        "train.optimizer_steps_per_rollout=1",
        "logging.tensorboard=true",
        "eval.every=-1",
        *SMALL,
        cwd=tmp_path,
        pythonpath=tmp_path,
    )
    run = tmp_path / "runs/unlucky"
    steps = steps_of(run)
    summary = json.loads((run / "finished.json").read_text())

    assert steps[0]["loss/skipped_updates"] == 1 and "4 of 4 groups had their update skipped" in output
    assert all(row["loss/skipped_updates"] == 0 and row["loss/grad_norm"] > 0 for row in steps[1:])
    assert summary["groups"]["failed[nan_update]"] == 4 and summary["groups"]["trained"] == 12

    assert sum(row["reward/failed"] for row in steps) > 0
    assert sum(row.get("reward/failed/reward_error", 0) for row in steps) == sum(row["reward/failed"] for row in steps)
    assert all({"reward/part/length", "reward/part/right"} <= row.keys() for row in steps)
    assert all(row["loss/kl"] >= 0 for row in steps[1:]) and steps[-1]["loss/kl"] > 0
    assert list((run / "tensorboard").glob("events*")), "TensorBoard was asked for"


def test_many_updates_a_rollout_with_dapo_and_k1_in_the_reward(tmp_path):
    rlpost(
        "train",
        "recipe=math/arithmetic",
        "algo=dapo",
        "name=many",
        "steps=2",
        "train=zero3",
        "train.optimizer_steps_per_rollout=2",
        "train.epochs=2",
        "algo.kl_coef=0.01",
        "algo.kl_estimator=k1",
        "eval.every=-1",
        "checkpoint.every=-1",
        *SMALL,
        cwd=tmp_path,
    )
    steps = steps_of(tmp_path / "runs/many")
    assert len(steps) == 2
    for row in steps:
        assert row["loss/skipped_updates"] == 0 and row["loss/ratio/max"] > 1.0, "later updates must see a ratio"
        assert row["reward/equal_groups_share"] == 0, "dynamic sampling leaves no group of equal rewards"
