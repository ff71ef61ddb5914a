"""The newcomer's two pages, word for word: every command of docs/first-run.md and docs/your-own-task.md, on small runs.

The commands and the files come from the pages. What installs is left out, `make demo` is the command that it stands
for, and each training is cut to two steps.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import fences, read, write_example

from .lives import Nursery
from .program import SMALL

ROOT = Path(__file__).parents[2]
INSTALLING = ("apt ", "make install", ". .venv/bin/activate")
DEMO = "rlpost train recipe=math/arithmetic"


def commands(page: str) -> list[str]:
    lines = [line for body in fences(page, "sh") for line in body.splitlines()]
    return [DEMO if line == "make demo" else line for line in lines if not line.startswith(INSTALLING)]


def walk(page: str, folder: Path, *small: str) -> dict[str, str]:
    """Runs the page's commands in their order in ``folder``; command -> what it printed."""
    printed = {}
    with Nursery(folder) as nursery:
        for command in commands(page):
            program, *words = shlex.split(command)
            if program == "python":
                done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, f"{command}\n{done.stderr}"
                printed[command] = done.stdout
                continue
            assert program == "rlpost", command
            life = nursery.live(*words, *(small if words[0] == "train" else ()))
            assert life.status == 0, f"{command}\n{life.output}"
            printed[command] = life.output
    return printed


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder, page = tmp_path_factory.mktemp("first"), read(ROOT / "docs" / "first-run.md")
    (reward,) = fences(page, "python")
    (folder / "my_reward.py").write_text(reward)
    return folder, walk(page, folder, "steps=2", *SMALL)


def test_the_first_run_goes_as_the_page_says(first_run: tuple[Path, dict[str, str]]) -> None:
    folder, printed = first_run
    assert "run in runs/arithmetic" in printed[DEMO] and "Accuracy after" in printed[DEMO]
    assert "runs/arithmetic  finished" in printed["rlpost watch runs/arithmetic"]
    assert "rollouts; open it in a browser" in printed["rlpost report runs/arithmetic"]
    assert (folder / "runs/arithmetic/report.html").is_file() and (folder / "compare.html").is_file()
    (check,) = [text for command, text in printed.items() if command.startswith("rlpost check")]
    assert "my_reward.right_and_short, a response at a time, in 2 worker processes, at most 30 s per call" in check
    compared = printed["rlpost runs --compare runs/arithmetic runs/short"]
    setting = next(line for line in compared.splitlines() if line.startswith("reward.function"))
    assert setting.split() == ["reward.function", "exact_answer", "my_reward.right_and_short"]
    assert "eval/accuracy" in compared and "short" in printed["rlpost runs"]
    assert (folder / "runs/middle/finished.json").is_file()


def test_the_changed_reward_is_what_was_trained(first_run: tuple[Path, dict[str, str]]) -> None:
    import pyarrow.parquet as parquet

    folder, _ = first_run
    for name, price in (("short", 0.03), ("middle", 0.01)):
        for row in parquet.read_table(folder / f"runs/{name}/rollouts/step-000001.parquet").to_pylist():
            right = float(row["reward"] > -price * len(row["response"]) + 0.5)
            text = row["response"].removesuffix("<end>")  # the reward is given the answer without its last token
            assert row["reward"] == pytest.approx(right - price * len(text))


def test_your_own_task_goes_as_the_page_says(tmp_path: Path) -> None:
    page = read(ROOT / "docs" / "your-own-task.md")
    write_example(tmp_path)
    printed = walk(page, tmp_path, "steps=2", *SMALL)
    by_hand = next(text for command, text in printed.items() if command.startswith("python -c"))
    assert by_hand.startswith("{'accuracy': 1.0, 'length': -0.015")
    assert "629 rows from train.jsonl" in printed["rlpost check recipe=my_recipe.yaml"]
    compared = printed["rlpost runs --compare runs/my_recipe runs/cheaper"]
    assert "0.002" in compared and "0.0005" in compared
    assert (tmp_path / "runs/my_recipe/report.html").is_file()
