"""Runs the stages, each in a process of its own with a time limit; prints a line a stage and keeps a JSON file.

    python -m benchmarks.gpu [--device cuda|cpu] [--small] [--only 0,3] [--minutes 8] [--out FILE]

The file is written anew after every stage, so that what was measured outlives a kill. Exit status 1: a stage failed.
Waits for one process at a time; nothing of CUDA is touched here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record, Settings, Skipped, last_error, read
from benchmarks.gpu.stages import PARTS, Part, run_call
from rlpost.bench.machine import describe_machine, find_revision, find_versions
from rlpost.errors import explain

BUDGET_MINUTES = 8.0  # what a part's ``needs_s`` and ``limit_s`` are made for
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one part."""

    stage: int
    name: str
    status: str  # PASS, FAIL or SKIP
    seconds: float
    figures: dict[str, Any]
    reason: str | None = None

    @property
    def line(self) -> str:
        pairs = {**self.figures, "seconds": round(self.seconds, 1)}
        words = [f"{self.stage}-{self.name}", self.status, *(f"{key}={value}" for key, value in pairs.items())]
        return " ".join([*words, *([] if self.reason is None else [f"reason={shlex.quote(self.reason)}"])])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--only", type=_numbers, default=None, metavar="0,3", help="these stages")
    parser.add_argument("--minutes", type=float, default=BUDGET_MINUTES, help="for all stages; their limits follow")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a stage's process is started with
    given = parser.parse_args(arguments)
    settings = Settings(device=given.device, small=given.small)
    if given.part is not None:
        return run_part(given.part, settings, given.out)
    if given.device == "cpu" and not given.small:
        parser.error(explain("--device cpu", "without --small", "--small: the shapes are a GPU's", "add it"))
    parts = [part for part in PARTS if given.only is None or part.stage in given.only]
    return check(settings, parts, minutes=given.minutes, out=given.out)


def check(settings: Settings, parts: Sequence[Part], *, minutes: float, out: Path) -> int:
    """Each part in turn; a part that would not fit into the time left is skipped."""
    started, scale = time.monotonic(), minutes / BUDGET_MINUTES
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "gpu": describe_gpu() if settings.on_gpu else None,
        "revision": find_revision(),
        "versions": {"python": sys.version.split()[0], **find_versions()},
        "minutes": minutes,
        **asdict(settings),
    }
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left = 60 * minutes - (time.monotonic() - started)
            if left < part.needs_s * scale:
                outcome = Outcome(
                    stage=part.stage, name=part.name, status="SKIP", seconds=0.0, figures={}, reason="time"
                )
            else:
                outcome = start_part(part, settings, Path(folder), limit_s=min(left, part.limit_s * scale))
            outcomes.append(outcome)
            print(outcome.line, flush=True)
            write(out, {**facts, "seconds": round(time.monotonic() - started, 1)}, outcomes)
    counts = {status: sum(o.status == status for o in outcomes) for status in ("PASS", "FAIL", "SKIP")}
    print(" ".join(f"{status}={count}" for status, count in counts.items()), f"written to {out}")
    return 1 if counts["FAIL"] else 0


def write(out: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    """A whole file takes the old one's place, so that a reader never finds half of one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".tmp")
    beside.write_text(json.dumps({**facts, "stages": [asdict(o) for o in outcomes]}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, out)


# ---- one part


def start_part(part: Part, settings: Settings, folder: Path, *, limit_s: float) -> Outcome:
    """The part's process and all that it started are ended after ``limit_s`` seconds."""
    record, log = folder / f"{part.label}.jsonl", folder / f"{part.label}.log"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", settings.device, "--part", part.call]
    command += ["--out", str(record), *(["--small"] if settings.small else [])]
    began, timed_out = time.monotonic(), False
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # its children too, and also when this process is interrupted
            end_group(process)
    outcome = judge(part, record, log, status=process.returncode, limit_s=limit_s if timed_out else None)
    return replace(outcome, seconds=time.monotonic() - began)


def judge(part: Part, record: Path, log: Path, *, status: int, limit_s: float | None) -> Outcome:
    """``limit_s``: the limit it ran into, if it did."""
    reported = read(record)
    outcome = Outcome(stage=part.stage, name=part.name, status="PASS", seconds=0.0, figures=reported.figures)
    if reported.skipped is not None:
        return replace(outcome, status="SKIP", reason=reported.skipped)
    if reported.failed:
        return replace(outcome, status="FAIL", reason="; ".join(reported.failed))
    if limit_s is not None:
        return replace(outcome, status="FAIL", reason=f"ended after {limit_s:.0f} s, its limit")
    if not reported.finished:
        return replace(outcome, status="FAIL", reason=f"{last_error(log)} (exit status {status})")
    return outcome


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child_environment(settings: Settings) -> dict[str, str]:
    """Nothing is fetched from a hub or sent to a tracker."""
    fixed = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    if not settings.on_gpu:
        fixed["CUDA_VISIBLE_DEVICES"] = ""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **fixed, "PYTHONPATH": path}


def run_part(call: str, settings: Settings, file: Path) -> int:
    """In the part's own process."""
    record = Record(file)
    try:
        run_call(call, settings, record)
    except Skipped:
        return 0
    except BaseException:  # also SystemExit: a library that gives up is a failed stage
        traceback.print_exc()
        return 1
    record.finish()
    sys.stdout.flush()
    os._exit(0)  # what a library does at exit is no part of the check


def describe_gpu() -> str | None:
    """For example ``NVIDIA H200, 143771 MiB, 580.65.06``; None without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def _numbers(text: str) -> set[int]:
    known = sorted({part.stage for part in PARTS})
    numbers = {int(word) for word in text.split(",") if word.strip().isdigit()}
    if not numbers or not numbers <= set(known) or len(numbers) != len(text.split(",")):
        raise argparse.ArgumentTypeError(
            explain("--only", text, f"some of {', '.join(map(str, known))}", "give numbers of stages, with commas")
        )
    return numbers
