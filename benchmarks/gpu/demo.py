"""Stage 3: the demo from the command line to its last checkpoint, four steps, with CUDA graphs on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.record import Record, Settings, last_error

STEPS = 4
LIMIT = 0.02  # mean |log ratio| of the newest tokens, nats
SMALL = ["rollout.groups_per_step=4", "rollout.samples_per_group=4", "engine.max_slots=16", "eval.max_prompts=10"]


def run(settings: Settings, record: Record) -> None:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlpost", "train", "recipe=math/arithmetic", f"device={settings.device}"]
        command += [f"model.dtype={settings.dtype}", f"steps={STEPS}", "name=gpu-check", f"runs_dir={folder}"]
        command += ["eval.samples_per_prompt=1", "logging.wandb=disabled", *(SMALL if settings.small else [])]
        start = time.time()
        log = Path(folder) / "log"
        with log.open("wb") as output:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        said = last_error(log)
        metrics = Path(folder) / "gpu-check" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    record.note(run_s=time.time() - start, exit_status=done.returncode)
    steps = [row for row in rows if "loss/tokens" in row]
    if steps:
        mismatch = max(row["mismatch/lag_0/abs_log_ratio"] for row in steps)
        record.note(
            steps=len(steps),
            mismatch_lag_0_nats=mismatch,
            canary_mean_nats=max(row["mismatch/canary"] for row in steps),
            canary_max_nats=max(row["mismatch/canary_max"] for row in steps),
            # The first step holds what is compiled on first use; the median of the others does not.
            first_step_s=steps[0]["time/step"],
            later_step_s=sorted(row["time/step"] for row in steps[1:])[len(steps[1:]) // 2],
        )
        record.require(mismatch < LIMIT, f"mismatch/lag_0 {mismatch:.2g} nats, not below {LIMIT}")
    record.require(done.returncode == 0, f"rlpost train: {said}")
    record.require(len(steps) == STEPS, f"{len(steps)} steps of {STEPS} in metrics.jsonl")
