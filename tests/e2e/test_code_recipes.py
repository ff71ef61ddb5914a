"""Both code recipes from the command line: evaluation and training on verdicts of the real sandbox."""

import re
from pathlib import Path

import pytest

from .program import read_metrics, rlpost, steps_of

CONTEST = Path(__file__).parents[1] / "fixtures/contest_tiny.jsonl"
SHORT = ["rollout.groups_per_step=8", "eval.max_prompts=40", "eval.samples_per_prompt=2", "logging.wandb=disabled"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    output = rlpost("train", "recipe=code/humaneval_style", "steps=2", "eval.every=0", *SHORT, cwd=folder)
    return folder / "runs/humaneval_style", output


def test_training_runs_on_verdicts_of_the_sandbox(run):
    for row in steps_of(run[0]):
        parts = {name.removeprefix("reward/part/"): value for name, value in row.items() if "/part/" in name}
        assert row["reward/failed"] == 0
        assert sum(value for name, value in parts.items() if name.startswith("outcome_")) == pytest.approx(1)
        assert parts["outcome_passed"] == pytest.approx(row["reward/mean"]) and 0.2 < row["reward/mean"] < 0.9
        assert parts["outcome_assertion"] > 0 and parts["outcome_time_limit"] == 0


def test_the_shipped_model_writes_half_of_the_programs_and_hard_codes_the_others(run):
    first = next(row for row in read_metrics(run[0]) if "eval/accuracy" in row)
    assert 0.3 < first["eval/accuracy"] < 0.65 and first["eval/num_failed"] == 0
    assert "Accuracy before" in run[1]


def test_programs_for_contests_are_evaluated(tmp_path):
    output = rlpost(
        "eval",
        "recipe=code/contest",
        "model=programs",
        "model.max_context_tokens=null",
        f"data.eval.path={CONTEST}",
        "data.template='{prompt}'",
        "data.max_prompt_tokens=null",
        "rollout.max_response_tokens=32",
        "eval.samples_per_prompt=2",
        cwd=tmp_path,
    )
    assert re.search(r"problems  3, 2 responses each, 6 in all\nmean@2    0.0 %", output)
    assert "could not be judged" not in output
