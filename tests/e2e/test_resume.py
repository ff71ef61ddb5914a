"""A run killed without warning goes on with the same command; a finished one makes room for a second."""

import signal
import subprocess
import time

from .program import SMALL, command, read_metrics, rlpost, rollouts_of, steps_of

RUN = ["train", "recipe=math/arithmetic", "name=killed", "steps=30", "checkpoint.every=4", "eval.every=4", *SMALL]


def test_kill_and_resume(tmp_path):
    run = tmp_path / "runs/killed"
    process = subprocess.Popen(command(*RUN), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "rollouts/step-000006.parquet").exists(), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    logged_before_the_kill = [row for row in read_metrics_leniently(run) if row["step"] <= 3]

    output = rlpost(*RUN, cwd=tmp_path)
    assert "resumed after step" in output and "Accuracy before" in output
    rows = steps_of(run)
    assert [row["step"] for row in rows] == list(range(1, 31)), "a step is missing or was logged twice"
    assert read_metrics(run)[: len(logged_before_the_kill)] == logged_before_the_kill
    evaluated = [row["step"] for row in read_metrics(run) if "eval/accuracy" in row]
    assert evaluated == [0, 4, 8, 12, 16, 20, 24, 28, 30], "an evaluation is missing or was logged twice"
    trained = [(row["uid"], row["index"]) for rows in rollouts_of(run).values() for row in rows]
    assert len(trained) == len(set(trained)) == 30 * 16, "a sample was trained twice"
    positions = sorted(int(uid.split(":")[1]) for uid, index in trained if index == 0)
    assert positions[-1] < 30 * 4 + 8, "prompts were skipped: more were drawn than are trained or open"

    # The same command again: the name is taken by a finished run, so a second one starts beside it.
    output = rlpost(*RUN[:3], "steps=1", "eval.every=-1", "checkpoint.every=-1", *SMALL, cwd=tmp_path)
    assert "run killed is taken; this one is killed-2" in output
    assert [row["step"] for row in steps_of(tmp_path / "runs/killed-2")] == [1]


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get far enough"
        time.sleep(0.02)


def read_metrics_leniently(run):
    """The killed process may have been in the middle of a line."""
    import json

    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
