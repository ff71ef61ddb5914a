"""The order of things: what is missing is run, what is there is not, and what is stopped half-way leaves nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlpost.bench.learning import run as run_module
from rlpost.bench.learning import study
from rlpost.bench.learning.cells import CORRECTED, SYNC, main_cell
from rlpost.bench.learning.run import _curve, _run, _summary
from rlpost.bench.learning.study import Plan, run_study
from rlpost.bench.learning.table import append_row, read_table
from rlpost.durable.stopping import Stopped
from rlpost.errors import ConfigError, DataError, RunError
from tests.bench.learning.rows import row


@pytest.fixture
def made(monkeypatch):
    """The names of the runs made, in order; they take no time and say nothing about learning."""
    names = []

    def run_cell(cell, *, digest, folder, core):
        names.append(cell.name)
        return row(cell, 0.5, digest=digest)

    monkeypatch.setattr(study, "run_cell", run_cell)
    return names


def plan(tmp_path, **values):
    return Plan(table=tmp_path / "studies" / "table.jsonl", only=["grpo-*-s0"], **values)


def quiet(line):
    pass


def test_the_same_command_goes_on_where_it_was(tmp_path, made):
    assert run_study(plan(tmp_path, limit=2), quiet) == 2
    assert made == ["grpo-sync-s0", "grpo-april-plain-s0"]
    assert run_study(plan(tmp_path, limit=2), quiet) == 2
    assert made[2:] == ["grpo-april-s0", "grpo-april-o1.5-v1-s0"]
    assert run_study(plan(tmp_path, minutes=0), quiet) == 0
    assert [r.cell for r in read_table(plan(tmp_path).table)] == made


def test_a_row_of_other_settings_counts_for_nothing_and_stays(tmp_path, made):
    old = row(main_cell("grpo", SYNC, 0), 0.9, digest="before")
    append_row(plan(tmp_path).table, old)
    run_study(plan(tmp_path, limit=1), quiet)
    assert made == ["grpo-sync-s0"]
    rows = read_table(plan(tmp_path).table)
    assert rows[0].digest == "before" != rows[1].digest and len(rows) == 2


def test_a_run_made_in_a_crowd_is_made_again_on_request_and_its_last_row_counts(tmp_path, made, monkeypatch):
    the_plan, crowd = plan(tmp_path, again=True), [2.0, 1.3, 1.0]

    def run_cell(cell, *, digest, folder, core):
        made.append(cell.name)
        one = row(cell, 0.5, digest=digest)
        return dataclasses.replace(one, wall_s=crowd.pop(0) * one.cpu_s) if cell.name == "grpo-sync-s0" else one

    monkeypatch.setattr(study, "run_cell", run_cell)
    number = run_study(plan(tmp_path), quiet)
    assert run_study(plan(tmp_path), quiet) == 0, "without --again it is done"
    assert run_study(the_plan, quiet) == 1, "still in a crowd, but not tried twice by one command"
    assert run_study(the_plan, quiet) == 1 and run_study(the_plan, quiet) == 0
    assert made[number:] == ["grpo-sync-s0"] * 2
    rows, cells = read_table(the_plan.table), study.choose_cells(the_plan.only)
    assert len(rows) == number + 2
    valid = study.valid_rows(cells, study.digest_cells(cells), rows)
    assert len(valid) == number and not any(r.is_crowded for r in valid)


def test_a_run_that_fails_appends_nothing(tmp_path, monkeypatch):
    def run_cell(*_, **__):
        raise RunError("it failed")

    monkeypatch.setattr(study, "run_cell", run_cell)
    with pytest.raises(RunError):
        run_study(plan(tmp_path), quiet)
    assert not plan(tmp_path).table.exists()


def test_a_pattern_that_fits_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--only"):
        run_study(Plan(table=tmp_path / "t", only=["ppo-*"]), quiet)


def test_a_row_is_read_as_it_was_written_and_not_written_twice(tmp_path):
    one = row(main_cell("grpo", CORRECTED, 0), 0.5)
    assert append_row(tmp_path / "t.jsonl", one) and not append_row(tmp_path / "t.jsonl", one)
    assert read_table(tmp_path / "t.jsonl") == [one]
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write(json.dumps({"cell": "x"}) + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl, line 2"):
        read_table(tmp_path / "t.jsonl")


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RunError, match="(?s)exit status 1.*no such luck"):
        _run(["-c", "raise SystemExit('no such luck')"], tmp_path / "log", None)


def test_what_a_process_uses_is_measured_and_it_keeps_to_its_core(tmp_path):
    core = max(os.sched_getaffinity(0))
    code = f"import os, time\nassert os.sched_getaffinity(0) == {{{core}}}\nwhile time.process_time() < 0.3: pass"
    used = _run(["-c", "import time; time.sleep(0.2)\n" + code], tmp_path / "log", core)
    assert 0.3 <= used.cpu_s < 2 and used.wall_s >= used.cpu_s + 0.1


def test_a_stop_ends_the_process_under_way(tmp_path, monkeypatch):
    """SIGTERM while a run is under way: nothing is left running, nothing is appended."""
    pid_file, late = tmp_path / "pid", tmp_path / "late"
    code = f"import os, time, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
    code += f"time.sleep(60)\npathlib.Path({str(late)!r}).touch()"

    def run_cell(cell, *, digest, folder, core):
        _run(["-c", code], folder / "log", core)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(study, "run_cell", run_cell)

    def stop():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped):
        run_study(plan(tmp_path), quiet)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert not late.exists(), "it was waited for, not ended"
    assert not plan(tmp_path).table.exists()


def test_a_curve_adds_up_training_and_leaves_evaluation_out():
    evaluation = {"eval/accuracy": 0.25, "eval/num_samples": 8, "eval/num_failed": 0, "eval/response_tokens": 5.0}
    evaluation |= {"eval/truncated_share": 0.0, "time/eval": 100.0}
    step = {"time/step": 3.0, "time/cpu": 2.0}
    steps = [
        {"step": 0, **evaluation},
        {"step": 1, "total/samples": 16, **step},
        {"step": 2, "total/samples": 32, **step, **evaluation, "eval/accuracy": 0.5},
    ]
    first, last = _curve(steps)
    assert (first.samples, first.wall_s, first.num_correct, first.num_judged) == (0, 0.0, 2, 8)
    assert (last.samples, last.wall_s, last.cpu_s, last.num_correct) == (32, 6.0, 4.0, 4)


def test_shares_are_weighed_by_tokens():
    def one(tokens, lag_1, ratio, changed):
        return {
            "rollout/consumed_tokens": tokens,
            "rollout/generated_tokens": tokens,
            "rollout/discarded_tokens": 0,
            "rollout/carried_share": lag_1,
            "rollout/length/admitted_mean": 1.0,
            "reward/mean": 0.0,
            "mismatch/lag_0/token_share": 1 - lag_1,
            "mismatch/lag_1/token_share": lag_1,
            "mismatch/lag_1/abs_log_ratio": ratio,
            "mismatch/lag_1/changed_share": changed,
        }

    found = _summary([one(100, 0.0, 0.0, 0.0), one(300, 0.5, 0.04, 0.1)])
    assert found["carried_share"] == pytest.approx(150 / 400)
    assert found["lag_shares"] == pytest.approx({"lag_0": 250 / 400, "lag_1": 150 / 400})
    assert found["lag_abs_log_ratio"]["lag_1"] == pytest.approx(0.04)  # of its 150 tokens, all in the second step
    assert found["changed_share"] == pytest.approx(15 / 400)


SMALL = """\
defaults: [/recipe/math/arithmetic_long, _self_]
steps: 2
eval: {every: 1, max_prompts: 8}
data: {train: {generator: {count: 64}}}
rollout: {groups_per_step: 4}
engine: {max_slots: 16}
"""


@pytest.mark.slow  # two starts of vLLM
def test_a_real_run_becomes_a_row(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.setattr("rlpost.bench.learning.cells.RECIPE", str(tmp_path / "small.yaml"))
    assert run_study(plan(tmp_path, limit=1), print) == 1
    (done,) = read_table(plan(tmp_path).table)
    assert (done.cell, done.samples, len(done.reward)) == ("grpo-sync-s0", 64, 2)
    assert [p.step for p in done.curve] == [0, 1, 2] and [p.num_judged for p in done.curve] == [8, 8, 8]
    assert done.final.num_judged == 32 and done.final_problems == 8 and done.carried_share == 0
    assert 0 < done.cpu_s < done.total_cpu_s and done.wall_s < done.total_wall_s and done.eval_cpu_s > 1
    assert run_module.find_revision() == done.revision and set(done.versions.values()).isdisjoint({"unknown"})


def test_the_command_lists_the_runs(tmp_path):
    command = [sys.executable, "-m", "rlpost", "bench", "learning", "--list", "--table", str(tmp_path / "none.jsonl")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(said) == 67 and said[0] == "open  grpo-sync-s0"
