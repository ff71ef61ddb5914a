"""The suite names its device: on a machine with a GPU no test of ours computes on it by accident."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import lives, program

TESTS = Path(__file__).parent
STARTS_RLPOST = re.compile(r"""["']-m["'],\s*["']rlpost["']|bin/rlpost (train|eval|sft|check)""")
# Nothing is computed by what they start: help, versions, lists.
NOTHING_COMPUTED = {"cli/test_cli.py", "bench/learning/test_study.py", "test_device.py"}


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose driver answers: what makes ``device=auto`` a GPU."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: pretended'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def has_gpu() -> bool:
    """As a program of its own sees it."""
    code = "from rlpost.workers.runtime import has_gpu; print(has_gpu())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TESTS.parent)
    return said.stdout.strip() == "True"


def test_no_program_of_the_suite_sees_the_machines_gpu(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert has_gpu(), "the machine is no GPU machine: the test could not fail"


@pytest.mark.parametrize("name", program.COMPUTING)
def test_a_program_of_the_suite_is_started_with_a_device(name: str) -> None:
    assert program.command(name, "recipe=math/arithmetic")[3:] == [name, "device=cpu", "recipe=math/arithmetic"]
    given = [name, "recipe=math/arithmetic", "device=cuda"]
    assert program.command(*given)[3:] == given, "what a test asks for is what it gets"


def test_a_life_is_started_with_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    orders = []

    def ask(nursery: lives.Nursery, order: dict[str, object]) -> int:
        orders.append(order)
        (tmp_path / "life.log").write_text("")
        return 0

    monkeypatch.setattr(lives.Nursery, "_ask", ask)
    lives.Nursery(tmp_path).live("train", "recipe=math/arithmetic")
    assert orders[0]["argv"] == ["train", "device=cpu", "recipe=math/arithmetic"]


def test_no_test_starts_rlpost_in_another_way() -> None:
    found = []
    for file in [*TESTS.rglob("*.py"), *TESTS.rglob("*.sh")]:
        name, text = file.relative_to(TESTS).as_posix(), file.read_text()
        if STARTS_RLPOST.search(text) and "device=cpu" not in text and name not in NOTHING_COMPUTED:
            found.append(name)
    assert not found, f"{found}: use tests.e2e.program.command, or name the device"
