"""Programs and probes with time limits: what crashes, hangs or fails becomes one line."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlpost.doctor import programs
from rlpost.doctor.programs import Ended, last_error, programs_killed, read_reports, run_probe, run_program

LIMIT_S = 300.0


def test_a_program_that_is_not_there_is_one_line() -> None:
    ended = run_program(["no-such-program"], LIMIT_S)
    assert ended.failure == "no-such-program: No such file or directory"


def test_a_failing_program_says_its_exit_status_and_its_last_error() -> None:
    code = "import sys; print('out'); sys.stderr.write('first\\nlast\\n'); sys.exit(3)"
    assert run_program([sys.executable, "-c", code], LIMIT_S) == Ended(out="out\n", failure="exit status 3: last")


def test_a_program_killed_by_a_signal_says_which() -> None:
    ended = run_program([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"], LIMIT_S)
    assert ended.failure.startswith("SIGSEGV")


def test_a_program_that_hangs_is_killed_with_all_that_it_started() -> None:
    began = time.monotonic()
    ended = run_program(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], 5.0)
    assert ended == Ended(out="begun\n", failure="not done within 5 s")
    assert time.monotonic() - began < 500


def test_the_line_of_a_traceback_that_counts_is_the_exception() -> None:
    text = "Traceback (most recent call last):\n  File x\nImportError: libcudart.so.13: cannot open\n\nsome note\n"
    assert last_error(text) == "ImportError: libcudart.so.13: cannot open"
    assert last_error("vllm.exceptions.FooException: bad\n") == "vllm.exceptions.FooException: bad"
    assert last_error("gcc: fatal error: no input\nstopped\n") == "stopped"
    assert last_error("\n\n") == ""


def test_what_runs_in_another_thread_can_be_ended() -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(run_program, ["sleep", "10000"], 9000.0) for _ in range(2)]
        with programs_killed():  # the second starts only when the first has been killed
            ended = [one.result() for one in waiting]
    assert [one.failure.partition(":")[0] for one in ended] == ["SIGKILL"] * 2
    assert run_program(["sleep", "0"], LIMIT_S).failure == ""


# ---- probes --------------------------------------------------------------------------------------------------------

PROBE = """
import os, signal
from rlpost.doctor.programs import Reports

def main(arguments):
    reports = Reports()
    print("a library's own words")
    reports.attempt("works", lambda: {"arguments": arguments})
    reports.attempt("fails", lambda: 1 / 0)
    if arguments == ["end"]:
        reports.end()
    reports.attempt("last", lambda: os.kill(os.getpid(), getattr(signal, arguments[0])))
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planted_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    return "planted_probe"


def test_a_probe_reports_what_worked_and_what_failed(probe: str) -> None:
    probed = run_probe(probe, ["end"], LIMIT_S)
    assert probed.results == {"works": {"arguments": ["end"]}}
    assert probed.failures == {"fails": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_probe_that_crashes_tells_where(probe: str, name: str) -> None:
    probed = run_probe(probe, [name], LIMIT_S)
    assert probed.results.keys() == {"works"} and probed.failures.keys() == {"fails", "last"}
    assert probed.failures["last"].startswith(name)


def test_a_probe_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_probe.py").write_text("raise ImportError('numpy is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run_probe("broken_probe", [], LIMIT_S).failures == {
        "start": "exit status 1: ImportError: numpy is broken",
    }


def test_a_probe_whose_doctor_was_killed_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_probe.py").write_text("import time\ndef main(arguments): time.sleep(10000)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(programs, "ORPHAN_S", -8998)
    probed = run_probe("hanging_probe", [], 9000.0)
    assert probed.failures["start"].startswith("SIGALRM")


def test_a_report_that_was_cut_off_is_left_out() -> None:
    out = '{"name": "a"}\n{"name": "a", "result": {}}\n{"name": "b"}\n{"name": "b", "resu'
    probed = read_reports(Ended(out=out, failure="not done within 5 s"))
    assert probed.results == {"a": {}} and probed.failures == {"b": "not done within 5 s"}


def test_an_error_of_several_lines_is_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long_probe.py").write_text(
        "from rlpost.doctor.programs import Reports\n"
        "def work(): raise RuntimeError('CUDA error: out of memory\\nFor debugging consider ...')\n"
        "def main(arguments):\n    reports = Reports()\n    reports.attempt('x', work)\n    reports.end()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run_probe("long_probe", [], LIMIT_S).failures == {"x": "RuntimeError: CUDA error: out of memory"}
