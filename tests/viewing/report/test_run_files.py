"""Logs to rows: one per step and one per evaluation, whatever lines they came on."""

import json
from pathlib import Path

import pytest

from rlpost.errors import RunError
from rlpost.viewing.report.run_files import join_lines, read_run

LINES = [
    {"step": 0, "time_s": 3.0, "eval/accuracy": 0.5, "time/eval": 3.0},
    {"step": 1, "time_s": 5.0, "reward/mean": 0.25, "time/step": 2.0, "total/samples": 8, "total/tokens": 90},
    {"step": 1, "time_s": 5.5, "time/save": 0.5},
    {"step": 1, "time_s": 9.5, "eval/accuracy": 0.75, "time/eval": 4.0},
    {"step": 1, "time_s": 9.6, "replay/error": 0.02},
]


def test_lines_of_one_step_are_joined() -> None:
    steps, evals, replay = join_lines(LINES)
    assert steps == [LINES[1] | {"time/save": 0.5, "time/eval": 4.0}]
    assert [(row["step"], row["time_s"], row["total/samples"], row["eval/accuracy"]) for row in evals] == [
        (0, 3.0, 0, 0.5),
        (1, 9.5, 8, 0.75),
    ]
    assert replay == {"replay/error": 0.02}


def test_the_two_logs_of_a_deterministic_run_make_the_same_rows() -> None:
    clocks = ("time_s", "time/eval", "time/step", "time/save", "replay/error")
    plain = [{k: v for k, v in line.items() if k not in clocks} for line in LINES]
    timings = [{"step": line["step"], **{k: v for k, v in line.items() if k in clocks}} for line in LINES]
    assert join_lines([line for line in plain if len(line) > 1] + timings) == join_lines(LINES)


def test_a_torn_line_is_left_out_and_absent_files_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:2]) + '{"step": 2, "rew')
    run = read_run(tmp_path)
    assert [row["step"] for row in run.steps] == [1]
    assert (run.config, run.summary, run.warnings, run.timeline) == ({}, None, [], [])


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_what_is_no_run_directory_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    with pytest.raises(RunError, match="expected a run directory"):
        read_run(folder)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{nonsense}\n")
    with pytest.raises(RunError, match="JSONDecodeError"):
        read_run(tmp_path)
