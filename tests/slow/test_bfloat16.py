"""The demo trained in bfloat16 learns what it learns in float32: master weights and sums of gradients are float32."""

from __future__ import annotations

import json

import pytest

from tests.e2e.program import rlpost, steps_of

pytestmark = pytest.mark.own_process

RUN = ["train", "recipe=math/arithmetic", "logging.wandb=disabled"]
BFLOAT16 = ["model.dtype=bfloat16"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_accuracy_in_bfloat16_is_within_two_points_of_float32(tmp_path):
    accuracy = {name: train(tmp_path, name, *extra)[-1] for name, extra in (("float32", []), ("bfloat16", BFLOAT16))}
    assert accuracy["bfloat16"] >= accuracy["float32"] - 0.02 > 0.85, accuracy


def test_a_few_steps_in_bfloat16_already_learn(tmp_path):
    """About 80 % after eight steps, from 55 %."""
    short = ["steps=8", "eval.max_prompts=200", "eval.samples_per_prompt=2", "eval.every=0"]
    before, after = train(tmp_path, "short", *BFLOAT16, *short)
    assert before < 0.65 < 0.7 < after, (before, after)
    assert all(row["loss/skipped_updates"] == 0 for row in steps_of(tmp_path / "runs/short"))


def train(folder, name, *settings):
    """Accuracies of the run's evaluations, in order."""
    rlpost(*RUN, *settings, f"name={name}", cwd=folder)
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
