"""Runs seen from outside: states, the table, two of them compared; a status that appears whole."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlpost.errors import RunError
from rlpost.reporting.status import StatusFile, read_status
from rlpost.viewing.run_list import compare_runs, describe_runs, find_runs, find_state, is_locked, summarize_run


def make_run(path: Path, *, rows: list[dict] | None = None, config: str = "steps: 10\nseed: 1\n") -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    (path / "lock").write_text("")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))
    return path


def step(number: int, **values: float) -> dict:
    return {
        "step": number,
        "time_s": float(number),
        "loss/tokens": 10,
        **{k.replace("__", "/"): v for k, v in values.items()},
    }


def evaluation(number: int, mean: float, half: float = 0.05) -> dict:
    ends = {"eval/accuracy_low": mean - half, "eval/accuracy_high": mean + half}
    return {"step": number, "time_s": float(number), "eval/accuracy": mean, **ends}


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_lock_is_seen_without_being_touched(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = path.open("a+")
    assert not is_locked(path)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert is_locked(path) and not is_locked(tmp_path / "absent")
    other = (tmp_path / "other").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    fcntl.flock(holder, fcntl.LOCK_UN)
    assert not is_locked(path), "another file's lock is not this one's"


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert find_state(run) == "running"
    process.kill()
    process.wait()
    assert find_state(run) == "killed"


@pytest.mark.parametrize(
    ("state", "finished", "seen"),
    [
        ("running", False, "killed"),
        ("stopped", False, "waiting"),
        ("failed", False, "failed"),
        ("running", True, "finished"),
    ],
)
def test_states_of_a_run_whose_process_is_gone(tmp_path: Path, state: str, finished: bool, seen: str) -> None:
    run = make_run(tmp_path / "a")
    status = StatusFile(run, steps=10, say=print)
    status.phase("update", 3)
    if state != "running":
        status.end(state)
    if finished:
        (run / "finished.json").write_text("{}")
    assert find_state(run) == seen


def test_a_run_on_another_machine_is_judged_by_its_last_sign(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    far = {"host": "elsewhere", "state": "running"}
    assert find_state(run, far | {"written_at": time.time() - 60}) == "running"
    assert find_state(run, far | {"written_at": time.time() - 3600}) == "killed"
    assert find_state(run, {"host": "elsewhere", "state": "stopped", "written_at": time.time()}) == "waiting"


# --- status ----------------------------------------------------------------------------------------------------------


def test_progress_is_written_a_few_times_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    status = StatusFile(tmp_path, steps=10, say=print)
    status.phase("generate", 2)
    written = []
    for _ in range(40):
        status.progress(len(written), 32, running=5, open_groups=6, left_s=None)
        written.append(read_status(tmp_path)["done"])
        now += 0.125
    assert len(set(written)) == 10  # 5 seconds
    status.phase("update", 2)
    assert read_status(tmp_path)["phase"] == "update" and read_status(tmp_path)["wanted"] == 0


def test_a_status_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "gone"
    status = StatusFile(folder, steps=10, say=said.append)
    status.phase("generate", 0)
    status.end("finished")
    assert len(said) == 1 and "status.json" in said[0] and read_status(folder) == {}


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    """Against a writer in another process, for a second."""
    code = (
        "import sys; from pathlib import Path; from rlpost.reporting.status import StatusFile\n"
        "status = StatusFile(Path(sys.argv[1]), steps=10, say=print)\n"
        "while True: status.phase('x' * 5000, 1)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        ends, seen = time.monotonic() + 20, 0
        while seen < 300 and time.monotonic() < ends:
            status = read_status(tmp_path)
            seen += bool(status)
            assert not status or len(status.get("phase", "x" * 5000)) == 5000
    finally:
        writer.kill()
        writer.wait()
    assert seen == 300


# --- the table -------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_not_inside_another(tmp_path: Path) -> None:
    for name in ("a", "deep/er/b"):
        make_run(tmp_path / name)
    make_run(tmp_path / "a/checkpoints/copy")
    (tmp_path / "no-run").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "deep/er/b"]
    with pytest.raises(RunError, match="runs: got"):
        find_runs(tmp_path / "absent")


def test_the_table_shows_best_and_last(tmp_path: Path) -> None:
    rows = [evaluation(0, 0.5), step(1), step(2), evaluation(2, 0.75), step(3), evaluation(3, 0.625)]
    make_run(tmp_path / "old", rows=rows, config="steps: 10\nseed: 7\nrecipe: math/gsm8k\n")
    make_run(tmp_path / "new", rows=[step(1, reward__mean=0.25), step(2, reward__mean=0.125)])
    make_run(tmp_path / "empty")
    os.utime(tmp_path / "old/metrics.jsonl", (0, time.time() - 7200))
    header, *lines = describe_runs(tmp_path).splitlines()
    assert header.split()[:3] == ["run", "state", "steps"]
    assert lines[0].split()[:3] == ["old", "killed", "3/10"] and "75.0 % (step 2)" in lines[0]
    assert "math/gsm8k" in lines[0] and lines[0].endswith("2 h 00 min ago")
    (new,) = [line for line in lines if line.startswith("new")]
    assert "reward 0.250 (step 1)" in new and "2/10" in new
    (empty,) = [line for line in lines if line.startswith("empty")]
    assert "0/10" in empty and summarize_run(tmp_path / "empty").best is None
    assert describe_runs(make_run(tmp_path / "alone/x")).splitlines()[1].startswith("x ")


def test_a_folder_without_runs_says_so(tmp_path: Path) -> None:
    assert describe_runs(tmp_path) == f"{tmp_path}: no runs"


# --- comparing -------------------------------------------------------------------------------------------------------


def test_metrics_are_compared_over_the_steps_that_both_have(tmp_path: Path) -> None:
    a = make_run(
        tmp_path / "a", rows=[step(n, reward__mean=n / 10) for n in range(1, 10)], config="steps: 9\nseed: 1\n"
    )
    b = make_run(tmp_path / "b", rows=[step(n, reward__mean=1.0) for n in range(1, 8)], config="steps: 7\nseed: 2\n")
    text = compare_runs(a, b)
    assert "steps    9  7" in text and "seed     1  2" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("reward/mean")]
    assert line == ["reward/mean", "0.5", "1", "+0.5", "steps", "3", "to", "7"]


@pytest.mark.parametrize(
    ("mean", "word"), [(0.9, "they do not overlap"), (0.55, "overlap: the difference may be chance")]
)
def test_intervals_say_whether_two_runs_differ(tmp_path: Path, mean: float, word: str) -> None:
    a = make_run(tmp_path / "a", rows=[evaluation(0, 0.1), evaluation(4, 0.5), evaluation(8, 0.95)])
    b = make_run(tmp_path / "b", rows=[evaluation(0, 0.1), evaluation(4, mean)])
    text = compare_runs(a, b)
    assert text.splitlines()[-1].endswith(word) and "A 45.0 to 55.0" in text
    assert "no setting differs" in text


def test_comparing_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a run directory"):
        compare_runs(make_run(tmp_path / "a"), tmp_path / "b")
