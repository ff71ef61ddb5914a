"""One cell of the study: `rlpost train` in a fresh process on one core, then the trained model's evaluation in another.

Returns a :class:`Row`, or raises and leaves nothing behind. The processes have one thread each, so that the CPU time
they use is what the run would take on a core of its own. Called by ``study``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlpost.bench.learning.cells import Cell
from rlpost.bench.learning.table import Point, Row
from rlpost.bench.machine import describe_machine, find_revision, find_versions
from rlpost.errors import RunError, explain
from rlpost.reporting.metrics import read_steps

FINAL_SAMPLES = 4  # responses per problem in the last evaluation: mean@4
TAIL_LINES = 12  # of a failed process's output, shown


def run_cell(cell: Cell, *, digest: str, folder: Path, core: int | None) -> Row:
    """``folder`` receives the run's directory and logs. ``core``: the only one the processes may use; None: all.

    Raises RunError if a process fails, with the end of its output.
    """
    started_at, load_before, revision = datetime.now(UTC), os.getloadavg()[0], find_revision()
    quiet = ["logging=quiet", "logging.keep_rollouts=false", "threads=1", f"runs_dir={folder}"]
    train = [*cell.overrides, *quiet, f"name={cell.name}", "resume=never", "checkpoint.every=-1"]
    train_used = _run(["-m", "rlpost", "train", *train], folder / f"{cell.name}.log", core)
    run_dir, counts_file = folder / cell.name, folder / f"{cell.name}-final.json"
    final = [*cell.overrides, *quiet, f"model.path={run_dir / 'model'}", f"eval.samples_per_prompt={FINAL_SAMPLES}"]
    module = "rlpost.bench.learning.final"
    eval_used = _run(["-m", module, str(counts_file), *final], folder / f"{cell.name}-final.log", core)
    load_after = os.getloadavg()[0]
    steps, counts = read_steps(run_dir), json.loads(counts_file.read_text())
    last = steps[-1]["step"]
    curve = _curve(steps)
    samples, wall_s, cpu_s = (getattr(curve[-1], name) for name in ("samples", "wall_s", "cpu_s"))
    return Row(
        cell=cell.name,
        **asdict(cell),
        digest=digest,
        revision=revision,
        versions=find_versions(),
        date=started_at.isoformat(timespec="seconds"),
        machine=describe_machine(),
        load_before=load_before,
        load_after=load_after,
        samples=samples,
        tokens=int(steps[-1]["total/tokens"]),
        wall_s=wall_s,
        cpu_s=cpu_s,
        total_wall_s=train_used.wall_s,
        total_cpu_s=train_used.cpu_s,
        eval_cpu_s=eval_used.cpu_s,
        curve=curve,
        final=Point(
            step=int(last),
            samples=samples,
            wall_s=wall_s,
            cpu_s=cpu_s,
            **{name: counts[name] for name in ("num_correct", "num_judged", "response_tokens", "truncated_share")},
        ),
        final_problems=counts["problems"],
        right_tokens=counts["right_tokens"],
        wrong_tokens=counts["wrong_tokens"],
        **_summary([row for row in steps if "time/step" in row]),
    )


def _curve(steps: Sequence[Mapping[str, float]]) -> list[Point]:
    """A point for each evaluation during the run."""
    points, samples, wall_s, cpu_s = [], 0, 0.0, 0.0
    for row in steps:
        wall_s += row.get("time/step", 0.0)
        cpu_s += row.get("time/cpu", 0.0)
        samples = int(row.get("total/samples", samples))
        if "eval/accuracy" in row:
            num_judged = int(row["eval/num_samples"] - row["eval/num_failed"])
            points.append(
                Point(
                    step=int(row["step"]),
                    samples=samples,
                    wall_s=wall_s,
                    cpu_s=cpu_s,
                    num_correct=round(row["eval/accuracy"] * num_judged),
                    num_judged=num_judged,
                    response_tokens=row["eval/response_tokens"],
                    truncated_share=row["eval/truncated_share"],
                )
            )
    return points


def _summary(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The rest of a row, from the steps that trained."""
    tokens = [row["rollout/consumed_tokens"] for row in steps]

    def mean(name: str, weights: Sequence[float] | None = None) -> float:
        weights = weights or [1.0] * len(steps)
        return sum(row.get(name, 0.0) * w for row, w in zip(steps, weights, strict=True)) / max(1e-9, sum(weights))

    lags = sorted({name.split("/")[1] for row in steps for name in row if name.endswith("/token_share")})
    shares = {
        lag: [row.get(f"mismatch/{lag}/token_share", 0.0) * n for row, n in zip(steps, tokens, strict=True)]
        for lag in lags
    }
    generated = sum(row["rollout/generated_tokens"] for row in steps)
    return {
        "reward": [row["reward/mean"] for row in steps],
        "length": [row["rollout/length/admitted_mean"] for row in steps],
        "carried_share": mean("rollout/carried_share", tokens),
        "lag_shares": {lag: sum(weights) / sum(tokens) for lag, weights in shares.items()},
        "lag_abs_log_ratio": {lag: mean(f"mismatch/{lag}/abs_log_ratio", weights) for lag, weights in shares.items()},
        "changed_share": sum(
            mean(f"mismatch/{lag}/changed_share", weights) * sum(weights) / sum(tokens)
            for lag, weights in shares.items()
        ),
        "clip_low_share": mean("loss/clip_low_share"),
        "clip_high_share": mean("loss/clip_high_share"),
        "approx_kl": mean("loss/approx_kl"),
        "idle_share": mean("rollout/idle_share"),
        "discarded_share": sum(row["rollout/discarded_tokens"] for row in steps) / max(1.0, generated),
    }


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Used:
    wall_s: float
    cpu_s: float  # user and system, all threads and children of the process


def _run(arguments: Sequence[str], log: Path, core: int | None) -> Used:
    """Waits for the process; if an exception ends this process, it ends that one first."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as out:
        # A separate session: Ctrl-C reaches this process alone, which then ends that one and all it started.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if status != 0:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise RunError(f"{explain(' '.join(arguments), f'exit status {status}', '0', 'see its last lines')}\n{said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(time.monotonic() - started, cpu_s)
