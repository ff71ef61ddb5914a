"""What a resume says about a changed configuration, and what deterministic mode refuses."""

from dataclasses import replace

import pytest

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.durable.config_changes import changed_keys, refuse_changes, was_left_open
from rlpost.errors import RunError


def test_leaves_are_compared_whatever_their_depth():
    cfg = Config()
    other = replace(cfg, steps=7, resume="never", train=replace(cfg.train, lr=3e-6, betas=[0.9, 0.95]))
    changes = changed_keys(to_yaml(cfg), to_yaml(other))
    assert {c.key: (c.before, c.now) for c in changes} == {
        "steps": (100, 7),
        "train.lr": (1e-6, 3e-6),
        "train.betas": ([0.9, 0.999], [0.9, 0.95]),
    }
    assert str(changes[0]) == "steps: 100 -> 7"
    assert changed_keys(to_yaml(cfg), to_yaml(cfg)) == []


def test_a_key_that_one_side_lacks_counts_as_none():
    assert [str(c) for c in changed_keys("a: 1\nb: {c: 2}", "a: 1\nd: 3")] == ["d: None -> 3", "b.c: 2 -> None"]


@pytest.mark.parametrize("change", ["watchdog_s: 1.0", "checkpoint: {every: 3}", "logging: {wandb: online}", "name: b"])
def test_determinism_allows_what_computes_nothing(change):
    refuse_changes(changed_keys("{}", change))


@pytest.mark.parametrize(
    "change", ["seed: 1", "steps: 3", "threads: 2", "checkpointer: 1", "rollout: {oversample: 1.0}"]
)
def test_determinism_refuses_the_rest_by_name(change):
    key = change.split(": {")[-1].split(":")[0]
    with pytest.raises(RunError, match=f"deterministic=true: .*{key}.*restore the old value"):
        refuse_changes(changed_keys("{}", change))


def test_what_was_left_open_and_is_written_out_now_is_no_change():
    before, now = "device: auto\ntrain: {max_row_tokens: null}", "device: cpu\ntrain: {max_row_tokens: 9}"
    device, rows = changed_keys(before, now)
    assert was_left_open(device, deterministic=False) and was_left_open(rows, deterministic=False)
    assert not was_left_open(device, deterministic=True), "deterministic runs always said"
    (back,) = changed_keys("device: cuda", "device: cpu")
    assert not was_left_open(back, deterministic=False)
    (canary,) = changed_keys("canary_threshold: null", "canary_threshold: 0.1")
    assert was_left_open(canary, deterministic=True)


def test_a_threshold_of_the_largest_difference_that_was_written_out_is_no_change():
    (canary,) = changed_keys("canary_threshold: 0.3", "canary_threshold: 0.1")
    assert was_left_open(canary, deterministic=True) and was_left_open(canary, deterministic=False)
    (chosen,) = changed_keys("canary_threshold: 0.2", "canary_threshold: 0.1")
    assert not was_left_open(chosen, deterministic=True)


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        (
            "{chat: auto}",
            "{chat: auto, chat_template_kwargs: {enable_thinking: false}}",
            "data.chat_template_kwargs.enable_thinking",
        ),
        ("{chat_template_kwargs: {a: 1}}", "{chat_template_kwargs: {}}", "data.chat_template_kwargs.a"),
        ("{prefill: null}", "{prefill: x}", "data.prefill"),
        ("{chat: auto}", "{chat: auto, chat_template: x}", "data.chat_template"),
    ],
)
def test_what_changes_prompts_is_a_change(before, now, key):
    """Their defaults are none, so that runs begun without these keys resume."""
    changes = changed_keys(f"data: {before}", f"data: {now}")
    changes = [change for change in changes if not was_left_open(change, deterministic=True)]
    assert [change.key for change in changes] == [key]
    with pytest.raises(RunError, match=f"deterministic=true: {key}"):
        refuse_changes(changes)


def test_a_key_that_an_earlier_version_did_not_have_is_no_change_at_its_default():
    new, other = changed_keys("seed: 0", "seed: 0\ntrain: {optimizer: adamw, gradient_reduction: mine}")
    assert was_left_open(new, deterministic=True) and not was_left_open(other, deterministic=True)
    (cleared,) = changed_keys("train: {optimizer: adamw}", "train: {optimizer: null}")
    assert not was_left_open(cleared, deterministic=True)
