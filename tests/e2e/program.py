"""Running ``rlpost`` as a user does: a process of its own, its folder, its exit status, its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 850
# Small enough for seconds: 4 prompts of 4 answers a step, short evaluations, no tracker.
SMALL = [
    "rollout.groups_per_step=4",
    "rollout.samples_per_group=4",
    "engine.max_slots=16",
    "eval.max_prompts=10",
    "eval.samples_per_prompt=1",
    "logging.wandb=disabled",
]


COMPUTING = ("train", "eval", "sft", "check")  # commands whose configuration has a device


def on_cpu(arguments: Sequence[str]) -> list[str]:
    """With the device named, unless it is: a run of these tests takes no GPU of the machine."""
    if not arguments or arguments[0] not in COMPUTING or any(a.startswith("device=") for a in arguments):
        return list(arguments)
    return [arguments[0], "device=cpu", *arguments[1:]]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlpost", *on_cpu(arguments)]


def rlpost(*arguments: str, cwd: Path, expect: int = 0, pythonpath: Path | None = None) -> str:
    """Standard output of ``rlpost ARGUMENTS``; fails with both streams when the exit status is another."""
    import os

    environment = dict(os.environ)
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == expect, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of whole steps, evaluations left out."""
    return [row for row in read_metrics(run) if "loss/tokens" in row]


def rollouts_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Every sample trained, by step."""
    import pyarrow.parquet as parquet

    files = sorted((run / "rollouts").glob("step-*.parquet"))
    return {int(f.stem.removeprefix("step-")): parquet.read_table(f).to_pylist() for f in files}
