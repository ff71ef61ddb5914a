"""Runs made before the folders were rearranged (version 0.1) open as they did: report, list and ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlpost.cli import main
from rlpost.config.compose import load_config
from rlpost.reporting.timeline import read_timeline
from rlpost.viewing.report.run_files import read_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_of_0_1"


@pytest.fixture
def run(tmp_path):
    """A copy: nothing that is opened may need to write, and nothing that is written may stay."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "runs" / "arithmetic"))


def test_the_list_knows_its_state_its_steps_and_its_accuracy(run, capsys):
    assert main(["runs", str(run.parent)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "arithmetic" in line]
    assert "finished" in line and "3/3" in line and "66.7" in line


def test_the_ledger_tells_the_same_story(run, capsys):
    assert main(["buffer", str(run)]) == 0
    out = capsys.readouterr().out
    summary = json.loads((run / "finished.json").read_text())
    assert "15 drawn" in out and f"{summary['groups']['trained']}" in out
    assert f"{summary['tokens']['trained']:,}" in out


def test_the_report_has_every_step_every_rollout_and_the_timeline(run, capsys):
    assert main(["report", str(run)]) == 0
    assert "48 rollouts" in capsys.readouterr().out
    assert (run / "report.html").stat().st_size > 100_000
    files = read_run(run)
    assert [row["reward/mean"] for row in files.steps] == [0.4375, 0.5625, 0.6875]
    assert [row["eval/accuracy"] for row in files.evals] == [pytest.approx(2 / 3)] * 2
    timeline = read_timeline(run)
    assert [step.step for step in timeline if step.admitted] == [1, 2, 3]
    assert sum(len(step.admitted) for step in timeline) == 12


def test_its_configuration_is_a_recipe_still(run):
    cfg = load_config([f"recipe={run / 'config.yaml'}"])
    assert (cfg.steps, cfg.rollout.groups_per_step, cfg.device) == (3, 4, "auto")
