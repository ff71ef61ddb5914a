"""The watch screen: curves, bars and words of one frame; text that a model wrote cannot move the cursor."""

from __future__ import annotations

import fcntl
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlpost.errors import RunError
from rlpost.reporting import rollout_files
from rlpost.types import Group, Prompt, Sample, Segment
from rlpost.viewing.watch import View, draw, printable, sparkline, watch


def sample(uid: str, index: int, reward: float | None, num_tokens: int = 3, version: int = 1) -> Sample:
    segment = Segment(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        rollout_logprobs=np.zeros(num_tokens, np.float32),
        policy_version=version,
    )
    failure = None if reward is not None else "timeout"
    return Sample(uid=uid, index=index, segments=(segment,), finish_reason="stop", reward=reward, failure=failure)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 12\n")
    (run / "lock").write_text("")
    rows = [
        {"step": 0, "time_s": 1.0, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6},
        *(
            {"step": n, "time_s": 10.0 * n, "loss/tokens": 5, "reward/mean": n / 10, "time/step": 10.0}
            for n in range(1, 5)
        ),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def frame(view: View, width: int = 100) -> str:
    view.look()
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(draw(view, width))
    return out.getvalue()


def live(run: Path, monkeypatch: pytest.MonkeyPatch, **facts: object) -> View:
    """As if a process held the run, with such a status."""
    status = {"steps": 12, "step": 4, "phase": "generate", "phase_started_at": time.time() - 7}
    status |= {"done": 8, "wanted": 32, "running": 60, "open_groups": 20, "left_s": 90.0, **facts}
    (run / "status.json").write_text(json.dumps(status))
    monkeypatch.setattr("rlpost.viewing.watch.find_state", lambda run, status: "running")
    return View(run)


# --- one frame -------------------------------------------------------------------------------------------------------


def test_a_frame_of_a_cluster_shows_its_workers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [
        {"rank": 0, "host": "one", "pid": 11, "phase": "generate", "silent_s": 0.2},
        {"rank": 1, "host": "two", "pid": 12, "phase": "update", "silent_s": 75.0},
    ]
    text = frame(live(run, monkeypatch, workers=workers))
    assert "worker 0 on one (process 11): generate\n" in text
    assert "worker 1 on two (process 12): update, no progress for 1 min 15 s" in text


def test_a_frame_while_generating(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = frame(live(run, monkeypatch))
    assert "step 5 of 12: generating (7 s)" in text
    assert "██████░░░░░░░░░░░░░░░░░░ 8/32 groups  60 samples running, 20 groups open" in text
    assert "████████░░░░░░░░░░░░░░░░ 4/12 steps  40 s so far, about 1 min 30 s left" in text
    assert "▁▃▆█" in text and "0.100 → 0.400" in text
    assert "50.0 % (40.0 to 60.0)" in text


def test_time_left_without_the_runs_own_estimate(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "about 1 min 20 s left" in frame(live(run, monkeypatch, left_s=None))


def test_evaluating_counts_responses(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = frame(live(run, monkeypatch, phase="eval", done=5, wanted=10))
    assert "after step 4 of 12: evaluating" in text and "5/10 responses\n" in text


def test_a_run_that_has_just_begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "metrics.jsonl").write_text("")
    text = frame(live(run, monkeypatch, phase="start", step=0, wanted=0, left_s=None))
    assert "after step 0 of 12: starting" in text and "known after the first step" in text


def test_answers_and_warnings(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        Group(
            uid=uid,
            prompt=Prompt(uid=uid, token_ids=np.array([1], np.int32), text=f"question {uid}"),
            samples=(sample(uid, 0, reward, version=n), sample(uid, 1, None)),
        )
        for n, (uid, reward) in enumerate([("0:0", 0.5), ("0:1", 1.0), ("0:2", 0.0)])
    ]
    rows = rollout_files.to_rows(groups, None, lambda ids: "line\nwith \x1b[31mcolour")
    rollout_files.write(rollout_files.file_of(run, 4), rows)
    warning = {"step": 3, "name": "truncated", "text": "40% were cut", "wakes": False}
    (run / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    text = frame(live(run, monkeypatch))
    assert "responses trained in step 4" in text and "step 3: 40% were cut" in text
    best, worst, last = (text.index(f"question 0:{n}") for n in (1, 2, 0))
    assert best < worst < last
    assert "reward 1, 3 tokens, stop, policy 1" in text and "\x1b" not in text and "line⏎with �[31mcolour" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_window(run: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    assert max(map(len, frame(live(run, monkeypatch), width).splitlines())) <= width


def test_what_has_changed_is_read_again(run: Path) -> None:
    view = View(run)
    assert "killed" in frame(view) and len(view.steps) == 5
    steps = view.steps
    view.look()
    assert view.steps is steps, "nothing new, nothing read"
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "time_s": 50.0, "loss/tokens": 1, "reward/mean": 0.5}\n{"step": 6, "ti')
    view.look()
    assert view.step == 5, "the torn line counts when it is whole"


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="watch: got"):
        View(tmp_path)


def test_a_run_that_starts_just_now_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its process holds the directory and still imports libraries: nothing but the lock is there."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch(tmp_path, once=True)
        assert f"{tmp_path}  starting" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(RunError, match="watch: got"):  # it died before it wrote anything
        watch(tmp_path, once=True)


def test_watch_waits_until_the_run_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def begin() -> None:
        (tmp_path / "config.yaml").write_text("steps: 12\n")
        lock.close()

    timer = threading.Timer(0.3, begin)
    timer.start()
    started = time.monotonic()
    watch(tmp_path, every_s=0.02)
    assert 0.25 < time.monotonic() - started < 10
    timer.join()


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([0, 1], 8, "▁█"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([2, 2, 2], 8, "▅▅▅"),
        ([0, 0, 4, 4, 2, 2, 0, 8], 4, "▁█▅█"),  # pairs: 0, 4, 2, 4
        ([], 8, ""),
    ],
)
def test_sparklines(values: list[float], width: int, curve: str) -> None:
    assert sparkline(values, width) == curve


def test_long_curves_keep_their_shape() -> None:
    curve = sparkline([float(n) for n in range(1000)], 20)
    assert len(curve) == 20 and curve[0] == "▁" and curve[-1] == "█" and list(curve) == sorted(curve)


def test_text_of_a_model_is_harmless() -> None:
    assert printable("a\x1b[2Jb\nc\td\x07 ü 漢") == "a�[2Jb⏎c�d� ü 漢"
