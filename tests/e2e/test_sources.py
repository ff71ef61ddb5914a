"""A run on several sources: files of two kinds and another tool's format, evaluated by name, stopped and resumed."""

from __future__ import annotations

import csv
import json
import operator
from pathlib import Path

import pytest

from rlpost.tasks.arithmetic import problems

from .program import read_metrics, rlpost, rollouts_of, steps_of

STEPS = 3


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    rows, held_out = problems(count=40, split="train"), problems(count=12, split="eval")
    verl = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "reward_model": {"ground_truth": row["answer"]}}
        for row in rows[:20]
    ]
    (tmp_path / "verl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verl))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "answer"), *((row["prompt"], row["answer"]) for row in rows[20:])])
    (tmp_path / "eval").mkdir()
    for number in (0, 1):
        (tmp_path / "eval" / f"{number}.json").write_text(json.dumps(held_out[6 * number : 6 * number + 6]))
    return [
        "recipe=math/arithmetic",
        f"runs_dir={tmp_path}",
        "deterministic=true",
        f"steps={STEPS}",
        "eval.every=2",
        "eval.samples_per_prompt=1",
        "checkpoint.every=1",
        "checkpoint.keep_last=9",
        "rollout.groups_per_step=6",
        "rollout.samples_per_group=2",
        "rollout.max_response_tokens=48",
        "data.train.generator=null",
        "data.eval.generator=null",
        f"data.train.sources={{v: {{path: {tmp_path}/verl.jsonl, format: verl, weight: 1}}, "
        f"c: {{path: {tmp_path}/table.csv, weight: 2}}}}",
        f"data.eval.sources={{easy: {{path: {tmp_path}/eval/0.json}}, all: {{path: {tmp_path}/eval}}}}",
    ]


def test_several_sources_train_evaluate_and_resume(overrides: list[str], tmp_path: Path) -> None:
    out = rlpost("train", *overrides, "name=whole", cwd=tmp_path)
    assert out.count("  easy: ") == out.count("  all: ") == 3
    evaluations = [row for row in read_metrics(tmp_path / "whole") if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 2, STEPS]
    for row in evaluations:
        assert (row["eval/easy/num_samples"], row["eval/all/num_samples"], row["eval/num_samples"]) == (6, 12, 18)
        low, mean, high = (row[f"eval/all/accuracy{end}"] for end in ("_low", "", "_high"))
        assert low <= mean <= high
        assert row["eval/accuracy"] == pytest.approx((6 * row["eval/easy/accuracy"] + 12 * mean) / 18)
    trained = steps_of(tmp_path / "whole")
    for row in trained:
        counts = [row.get(f"source/{name}/groups", 0) for name in ("v", "c")]
        assert sum(counts) == 6
        rewards = [row.get(f"source/{name}/reward", 0) for name in ("v", "c")]
        assert sum(map(operator.mul, rewards, counts)) / 6 == pytest.approx(row["reward/mean"])
    assert sum(row["source/c/groups"] for row in trained) > sum(row.get("source/v/groups", 0) for row in trained)
    samples = rollouts_of(tmp_path / "whole")
    assert {sample["uid"].partition("/")[0] for step in samples.values() for sample in step} == {"v", "c"}

    # Another run from the first's checkpoint of step 1: the same draws, the same samples.
    (start,) = (tmp_path / "whole" / "checkpoints").glob("*1")
    rlpost("train", *overrides, "name=second", f"resume={start}", cwd=tmp_path)
    assert steps_of(tmp_path / "second") == trained[1:]
    again = rollouts_of(tmp_path / "second")
    assert again == {step: samples[step] for step in (2, 3)}
