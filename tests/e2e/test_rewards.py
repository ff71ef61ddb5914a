"""Rewards in a whole run: judged in workers beside generation, their failures counted, nothing left when it ends."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlpost.algos.advantages import FunctionRewards, gdpo
from tests.rewards.library.chat_endpoint import Endpoint

from .program import SMALL, TIMEOUT_S, command, read_metrics, rlpost, rollouts_of, steps_of

ROOT = Path(__file__).parents[2]
REWARDS = '''
import asyncio, os, signal, time
from pathlib import Path

def unlucky(response, *, reference):
    """By the response's text: sleeps past its deadline, dies, raises, or judges. Pure, so that a cache may know it."""
    with open("calls", "a") as calls:
        calls.write(f"{os.getpid()}\\n")
    number = sum(map(ord, response)) % 40
    if number == 0:
        time.sleep(600)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise ValueError("no")
    return {"accuracy": float(response.endswith("#" + reference))}

def relative(completions, answer, **_):
    """TRL's style, of a whole group."""
    lengths = [len(c) for c in completions]
    return [None if not n else 1.0 - n / max(lengths) for n in lengths]

def slow(response, **_):
    Path("workers").open("a").write(f"{os.getpid()}\\n")
    time.sleep(600)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_run_whose_reward_hangs_dies_and_raises(folder):
    functions = "{right: {function: mine.unlucky}, short: {function: mine.relative, weight: 0.1}}"
    output = rlpost(
        "train",
        "recipe=math/arithmetic",
        "name=unlucky",
        "steps=4",
        "reward.function=null",
        f"reward.functions={functions}",
        "reward.workers=2",
        "reward.timeout_s=1",
        "checkpoint.every=2",
        "eval.every=0",
        *SMALL,
        "rollout.samples_per_group=8",
        cwd=folder,
        pythonpath=folder,
    )
    run = folder / "runs/unlucky"
    steps = steps_of(run)
    failed = {}
    for row in steps:
        for name, count in row.items():
            if name.startswith("reward/failed/"):
                failed[name.split("/")[-1]] = failed.get(name.split("/")[-1], 0) + count
    assert failed and set(failed) <= {"timeout", "crash", "reward_error"}
    assert sum(row["reward/failed"] for row in steps) == sum(failed.values())
    killed = failed.get("timeout", 0) + failed.get("crash", 0)
    assert killed <= sum(row["reward/replaced_workers"] for row in steps), "each took its worker with it"
    assert "rewards failed (" in output and "the last one: " in output
    assert all({"reward/part/right", "reward/part/short", "reward/part/accuracy"} <= row.keys() for row in steps)
    assert json.loads((run / "finished.json").read_text())["groups"]["trained"] == 16
    assert not alive({int(pid) for pid in (folder / "calls").read_text().split()}), "a worker outlived its run"
    assert all(0 < row["reward/call_s"] <= row["reward/call_s/max"] and row["reward/retried"] == 0 for row in steps)
    assert any("reward/cache_hit_share" in row for row in steps)
    assert any("eval/cache_hit_share" in row for row in read_metrics(run))
    (count,) = sqlite3.connect(run / "verdicts.sqlite").execute("SELECT count(*) FROM verdicts_1").fetchone()
    assert count > 0


def test_a_judge_on_a_budget_and_another_reward_under_gdpo(folder):
    """A spent budget stops the run; with a higher one it goes on and keeps counting. What is trained on is GDPO of the
    two functions' own values."""
    endpoint = Endpoint()
    endpoint.reply = lambda request: f"Score: {sum(map(ord, request['messages'][0]['content'])) % 11}"
    judge = {
        "_target_": "judge",
        "url": endpoint.url,
        "model": "tiny",
        "rubric": "{response} should be {reference}",
        "budget_requests": 9,
    }
    functions = {"judged": {"function": judge}, "short": {"function": "mine.relative", "weight": 0.5}}
    recipe = yaml.safe_load((ROOT / "recipes/math/arithmetic.yaml").read_text())
    recipe["reward"] = {"function": None, "functions": functions, "workers": 2}
    small = ["name=gdpo", "steps=3", "algo.advantage=gdpo", "eval.every=-1", "algo.max_filtered_groups=16", *SMALL]
    try:
        for budget, status in ((9, 3), (100_000, 0)):
            judge["budget_requests"] = budget
            (folder / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
            output = rlpost("train", "recipe=mine.yaml", *small, cwd=folder, expect=status, pythonpath=folder)
            assert ("budget: 9 of 9 requests are spent" in output) == (status == 3), output
            assert len(endpoint.requests) == 9 or status == 0
    finally:
        endpoint.close()
    run = folder / "runs/gdpo"
    (spent,) = sqlite3.connect(run / "reward_budget.sqlite").execute("SELECT requests FROM spent").fetchone()
    # A request is counted before it is sent, and the last ones may have ended with their workers.
    assert 9 < len(endpoint.requests) <= spent <= len(endpoint.requests) + 16
    compared = 0
    for rows in rollouts_of(run).values():
        groups = {}
        for row in rows:
            if row["reward"] is not None:
                groups.setdefault(row["uid"], []).append(row)
        parts = [[json.loads(row["reward_parts"]) for row in group] for group in groups.values()]
        given = [
            FunctionRewards(name, weight, [np.array([p.get(name, np.nan) for p in group]) for group in parts])
            for name, weight in (("judged", 1.0), ("short", 0.5))
        ]
        for group, expected in zip(groups.values(), gdpo(parts, eps=1e-6, functions=given), strict=True):
            np.testing.assert_allclose([row["advantage"] for row in group], expected, rtol=1e-6, atol=1e-9)
            compared += np.count_nonzero(expected)
    assert compared > 20


def test_a_second_evaluation_is_judged_from_the_cache(folder):
    arguments = ["recipe=math/arithmetic", "device=cpu", "reward.function=mine.unlucky", "reward.timeout_s=1"]
    arguments += ["reward.cache_dir=verdicts", "eval.max_prompts=40", "eval.samples_per_prompt=1", "reward.workers=1"]
    first = rlpost("eval", *arguments, cwd=folder, pythonpath=folder)
    paid = len((folder / "calls").read_text().split())
    second = rlpost("eval", *arguments, cwd=folder, pythonpath=folder)
    asked = len((folder / "calls").read_text().split()) - paid
    failed = 40 - sum(
        1 for _ in sqlite3.connect(folder / "verdicts/verdicts.sqlite").execute("SELECT 1 FROM verdicts_1")
    )
    assert paid == 40 and asked == failed < 10, "only what failed was asked again"
    lines = [[line for line in out.splitlines() if line.startswith(("mean@", "failed"))] for out in (first, second)]
    assert lines[0] == lines[1] and lines[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_no_worker(folder, number):
    """SIGINT as the terminal sends it: to the whole process group."""
    arguments = ["train", "recipe=math/arithmetic", "name=killed", "reward.function=mine.slow", "eval.every=-1", *SMALL]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command(*arguments, "reward.workers=2", "steps=2"),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (folder / "workers").exists() or len((folder / "workers").read_text().split()) < 2:
                assert time.monotonic() < deadline and process.poll() is None, (folder / "output").read_text()
                time.sleep(0.1)
            pids = [int(pid) for pid in (folder / "workers").read_text().split()]
            assert len(alive(pids)) == 2
            os.killpg(process.pid, number)
            assert process.wait(60) == (130 if number == signal.SIGINT else -number)
        finally:
            process.kill()
    patience = time.monotonic() + 10
    while alive(pids) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not alive(pids)


def test_a_reward_that_cannot_be_loaded_ends_the_run_before_a_device_is_touched(folder):
    output = rlpost(
        "train", "recipe=math/arithmetic", "reward.function=mine.nothing", cwd=folder, pythonpath=folder, expect=2
    )
    assert output.count("\n") == 1 and "reward.function: got 'mine.nothing'" in output
    assert not (folder / "runs").exists()
