"""Runs the test suite as a few pytest processes and adds them up. Called by the Makefile; standard library only.

    python tests/run.py fast | all | slow | torture  [pytest arguments]

A vLLM engine's shutdown destroys the process group of its process, DeepSpeed's included, so files that start an engine
get a process of their own: those in ``tests/e2e``, those that carry the marker ``own_process`` and those that name the
vLLM engine class. ``tests/train``, ``tests/sft`` and other files that use DeepSpeed share one process, those that
start reward workers, sandboxes or a browser share another, all others share the last (``fast`` runs only that one),
which deals its files to two workers (pytest-xdist). Every process runs even when an earlier one failed; the exit status
is non-zero when any failed. At the end: the 20 slowest tests of all and the totals.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).parent
OWN_PROCESS = re.compile(
    r"mark\.own_process|VLLMEngine|VllmEngine|engine\.vllm\b|engine import vllm\b|import vllm\b|from vllm\b"
)
DEEPSPEED = re.compile(r"deepspeed_trainer|DeepSpeedTrainer|import deepspeed|DeepSpeedPolicyTrainer")
WORKERS = re.compile(r"RewardWorkers|WorkerProcess|rlpost\.sandbox|CodeFunctions|chromium")
NO_TESTS_COLLECTED = 5  # pytest's exit status for a file whose tests are all deselected
FAST = "everything else"
TWO_WORKERS = ["-n", "2", "--dist", "loadfile"]
MARKERS = {"fast": "not slow and not torture", "all": "not slow and not torture", "slow": "slow", "torture": "torture"}

# Tests share the machine with other processes: one thread each, and no compilation of vLLM's small kernels.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def main(arguments: list[str]) -> int:
    mode, extra = (arguments[0] if arguments else "all"), arguments[1:]
    if mode not in MARKERS:
        print(f"tests/run.py: got {mode!r}; expected one of {', '.join(MARKERS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script started this in the background
    failed: list[str] = []
    timings: list[tuple[float, str]] = []
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    started = time.monotonic()
    groups = plan(mode)
    for number, (name, files) in enumerate(groups, 1):
        print(f"--- {number}/{len(groups)} {name}: {len(files)} file{'s' * (len(files) != 1)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "junit.xml"
            status = run_pytest(files, MARKERS[mode], report, extra, TWO_WORKERS if name == FAST else [])
            if status not in (0, NO_TESTS_COLLECTED):
                failed.append(f"{name} (exit status {status})")
            if report.exists():
                add_up(report, totals, timings)
    print_totals(totals, timings, failed, len(groups), time.monotonic() - started)
    return 1 if failed or not totals["tests"] else 0


def plan(mode: str) -> list[tuple[str, list[Path]]]:
    """The processes to run as (name, files). The shared process comes last, so pytest's last summary is the largest."""
    files: dict[str, list[Path]] = {"own": [], "trainer": [], "workers": [], "fast": []}
    for file in sorted(TESTS.rglob("test_*.py")):
        files[kind_of(file)].append(file)
    groups = [(FAST, files["fast"])] if files["fast"] else []
    if mode == "fast":
        return groups
    names = {"trainer": "trainer", "workers": "workers, sandboxes, a browser"}
    shared = [(name, files[kind]) for kind, name in names.items()]
    groups = [group for group in shared if group[1]] + groups
    return [*((str(file.relative_to(TESTS)), [file]) for file in files["own"]), *groups]


def kind_of(file: Path) -> str:
    folder, text = file.relative_to(TESTS).parts[0], file.read_text()
    if folder == "e2e" or OWN_PROCESS.search(text):
        return "own"
    if folder in ("train", "sft") or DEEPSPEED.search(text):
        return "trainer"
    return "workers" if WORKERS.search(text) else "fast"


def run_pytest(files: list[Path], marker: str, report: Path, extra: list[str], parallel: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-m", marker, "--durations=20", "--durations-min=1.0"]
    command += [f"--junitxml={report}", *parallel, *extra, *map(str, files)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, cwd=TESTS.parent, env=environment, stdin=subprocess.DEVNULL).returncode


def add_up(report: Path, totals: dict[str, int], timings: list[tuple[float, str]]) -> None:
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            timings.append((float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}"))


def print_totals(
    totals: dict[str, int], timings: list[tuple[float, str]], failed: list[str], processes: int, seconds: float
) -> None:
    print("--- slowest 20 tests of all")
    for duration, name in sorted(timings, reverse=True)[:20]:
        print(f"{duration:8.2f} s  {name}")
    bad = totals["failures"] + totals["errors"]
    passed = totals["tests"] - bad - totals["skipped"]
    counts = f"{passed} passed, {bad} failed, {totals['skipped']} skipped"
    print(f"--- total of {processes} pytest processes: {counts} in {seconds:.0f} s")
    for name in failed:
        print(f"--- failed: {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
