"""Warnings that teach: each rule speaks where it should, once, and is silent on a run that goes well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlpost.config.compose import load_config
from rlpost.prompts.encoding import PromptSet, fingerprint
from rlpost.reporting.advice import RULES, Advice, Adviser, Facts, WarningsFile, facts_of, read_warnings
from rlpost.types import Prompt

FACTS = Facts(
    april=True,
    has_filter=True,
    max_response_tokens=192,
    mismatch_stop=0.5,
    num_eval_prompts=100,
    num_eval_prompts_in_train=0,
)
HEALTHY = {
    "loss/tokens": 5000,
    "loss/sequences": 256,
    "loss/entropy": 0.1,
    "loss/skipped_updates": 0,
    "reward/mean": 0.5,
    "reward/min": 0.0,
    "reward/max": 1.0,
    "reward/failed": 0,
    "reward/equal_groups_share": 0.1,
    "rollout/accepted_share": 0.9,
    "rollout/truncated_share": 0.02,
    "rollout/length/admitted_mean": 40.0,
    "rollout/idle_share": 0.05,
    "rollout/launched_samples": 200,
    "rollout/resumed_samples": 60,
    "rollout/preemptions": 20,
    "mismatch/lag_0/abs_log_ratio": 1e-4,
}
# rule -> (what later steps show, facts, words of the sentence)
WRONG = {
    "shared_prompts": ({}, {"num_eval_prompts_in_train": 7}, "7 of 100 evaluation prompts"),
    "constant_reward": (
        {"reward/min": 0.0, "reward/max": 0.0},
        {},
        "was 0, so nothing can be learned: look at responses",
    ),
    "filtered_groups": ({"rollout/accepted_share": 0.1}, {}, "rejected 90% of the groups"),
    "equal_groups": ({"reward/equal_groups_share": 0.9}, {}, "in 90% of the groups"),
    "truncated": (
        {"rollout/truncated_share": 0.5},
        {},
        "50% of the responses of the last 3 steps were cut at 192 tokens",
    ),
    "entropy_collapse": ({"loss/entropy": 0.005}, {}, "entropy fell from 0.1 to 0.005 nats"),
    "length_collapse": ({"rollout/length/admitted_mean": 5.0}, {}, "responses shrank from 40 to 5 tokens"),
    "growing_mismatch": ({"mismatch/lag_0/abs_log_ratio": 0.02}, {}, "differ by 0.02 nats, up from 0.0001"),
    "idle_tail": ({"rollout/idle_share": 0.5}, {}, "50% of the engine's slots were empty"),
    "full_kv_cache": ({"rollout/preemptions": 70}, {}, "preempted 110 responses in the last 3 steps"),
    "failing_rewards": ({"reward/failed": 64}, {}, "128 rewards of the last 3 steps failed, 14% of all"),
    "skipped_updates": ({"loss/skipped_updates": 1}, {}, "NaN or infinite"),
}


def said(later, facts, num_steps=8):
    """Names of what is said, step by step, of a run that is healthy for 3 steps and then shows ``later``."""
    adviser = Adviser(Facts(**{name: facts.get(name, getattr(FACTS, name)) for name in FACTS.__slots__}))
    spoken = [adviser.look()]
    spoken += [adviser.look({**HEALTHY, **(later if step > 3 else {})}) for step in range(1, num_steps)]
    return [[warning.name for warning in warnings] for warnings in spoken], [w for ws in spoken for w in ws]


def test_every_rule_has_a_case():
    assert WRONG.keys() == RULES.keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_speaks_once_and_alone(name):
    later, facts, words = WRONG[name]
    names, warnings = said(later, facts)
    assert [w.name for w in warnings] == [name]
    assert words in warnings[0].text and "\n" not in warnings[0].text
    assert ": " in warnings[0].text, "what is seen, what it means, what to try"
    when = next(step for step, spoken in enumerate(names) if spoken)
    assert when == {"shared_prompts": 0, "skipped_updates": 4}.get(name, when)
    assert name in ("shared_prompts", "skipped_updates") or 4 <= when <= 6, "not before the window shows it"


def test_a_run_that_goes_well_hears_nothing():
    assert said({}, {})[1] == []
    solved = {"reward/mean": 0.97, "loss/entropy": 0.002, "reward/equal_groups_share": 0.75}
    assert said(solved, {})[1] == [], "certainty is what a solved task looks like"
    assert said({"rollout/idle_share": 0.6}, {"april": False})[1] == [], "synchronous runs idle by design"
    assert said({"rollout/accepted_share": 0.1}, {"has_filter": False})[1] == []
    assert said({"mismatch/lag_0/abs_log_ratio": 2e-3}, {})[1] == [], "grown, and still far from anything that matters"


def test_a_reward_that_is_always_one_reads_otherwise():
    (warning,) = said({"reward/min": 1.0, "reward/max": 1.0}, {})[1]
    assert "was 1" in warning.text and "harder prompts" in warning.text


def test_one_odd_step_is_noise():
    adviser = Adviser(FACTS)
    for step in range(12):
        odd = {"rollout/truncated_share": 1.0, "reward/max": 0.0, "loss/entropy": 0.0} if step % 4 == 3 else {}
        assert adviser.look({**HEALTHY, **odd}) == []


def test_what_was_said_is_not_said_again_after_a_resume(tmp_path: Path):
    later = {**HEALTHY, "rollout/truncated_share": 0.5}
    rows = [{"step": step, **later} for step in range(1, 7)]
    file = WarningsFile(tmp_path)
    adviser = Adviser(FACTS)
    for row in rows:
        for warning in adviser.look(row):
            file.append(row["step"], warning)
    file.append(6, Advice("idle_tail", "x", is_urgent=True))
    file.close()
    assert [(w["step"], w["name"]) for w in read_warnings(tmp_path)] == [(3, "truncated"), (6, "idle_tail")]
    again = WarningsFile(tmp_path)
    names = again.rewind(4)
    assert names == ["truncated"] == [w["name"] for w in read_warnings(tmp_path)]
    resumed = Adviser(FACTS)
    resumed.recall([{"step": 0, "eval/accuracy": 0.5}, *rows[:4]], names)
    assert resumed.look(later) == []
    fresh = Adviser(FACTS)
    file = WarningsFile(tmp_path)
    file.append(0, Advice("shared_prompts", "x", is_urgent=False))
    file.close()
    assert WarningsFile(tmp_path).rewind(0) == ["shared_prompts"], "a checkpoint of step 0 knows what came before it"
    fresh.recall(rows[:4], WarningsFile(tmp_path).rewind(None))
    assert [w.name for w in fresh.look(later)] == ["truncated"], "a run that begins again says it again"


def test_shared_prompts_are_counted_by_their_tokens():
    def prompts(*texts):
        return [Prompt(uid=t, token_ids=np.array([ord(c) for c in t], np.int32), text=t) for t in texts]

    def prompt_set(*texts):
        made = prompts(*texts)
        return PromptSet(prompts=made, num_dropped=0, fingerprints=np.array([fingerprint(one) for one in made]))

    trained = (prompt_set("1+1?"), prompt_set("2+2?"))
    facts = facts_of(load_config(["recipe=math/arithmetic"]), trained, prompts("2+2?", "3+3?"))
    assert (facts.num_eval_prompts_in_train, facts.num_eval_prompts, facts.april, facts.has_filter) == (
        1,
        2,
        True,
        False,
    )


def test_keys_named_in_the_sentences_exist():
    import re

    from rlpost.config import walk_fields

    keys = {key.name for key in walk_fields()}
    for later, facts, _ in WRONG.values():
        for warning in said(later, facts)[1]:
            named = re.findall(r"\b(?:algo|train|rollout|model|reward|engine|data)\.[a-z_.]+[a-z]", warning.text)
            assert set(named) <= keys, warning.text
