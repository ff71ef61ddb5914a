"""Runs seen from outside: those below a folder, the state of each, how two of them differ. Only reads.

``rlpost runs`` prints it; ``viewing.watch`` reads one run's state from it. A run is

    running   a process holds its directory
    waiting   it stopped cleanly before its last step; the same command resumes it
    failed    it ended itself, with a message; the same command resumes it from the last checkpoint
    killed    its process is gone without a message; the same command resumes it from the last checkpoint
    finished  all steps are done
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpost.durable.config_changes import changed_keys
from rlpost.durable.run_dir import FINISHED
from rlpost.durable.run_state import CONFIG_FILE
from rlpost.errors import RunError, explain
from rlpost.reporting import metrics
from rlpost.reporting.progress import duration, percent
from rlpost.reporting.status import read_status

LOCKS = Path("/proc/locks")
SILENCE_S = 900.0  # a run on another machine that has been silent this long is considered dead
COMPARED_STEPS = 5  # metrics of two runs are means over this many steps, the last ones that both have

COMPARED = (
    *("eval/accuracy", "eval/pass_at_k", "eval/response_tokens", "reward/mean", "reward/failed"),
    *("eval/loss", "loss/nll"),
    *("rollout/length/admitted_mean", "rollout/truncated_share", "loss/entropy", "loss/approx_kl", "loss/grad_norm"),
    *("mismatch/lag_0/abs_log_ratio", "rollout/consumed_tokens_per_s", "rollout/idle_share", "rollout/carried_share"),
    *("time/step", "time/generate", "time/update"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    path: Path
    state: str
    step: int
    steps: int  # of the whole run; 0: not known
    best: float | None  # the best evaluation, else the best mean reward
    best_is: str  # "eval/accuracy", "eval/loss", "reward/mean" or ""
    best_step: int
    recipe: str
    seed: int | None
    touched_at: float  # when it last logged something, Unix time


# ---- one run ---------------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / "lock").exists()


def find_state(run: Path, status: Mapping[str, Any] | None = None) -> str:
    """The run's state: see the module docstring. Looks at the lock without touching it."""
    status = read_status(run) if status is None else status
    if status.get("host", socket.gethostname()) != socket.gethostname():
        held = status["state"] == "running" and time.time() - status["written_at"] < SILENCE_S
    else:
        held = is_locked(run / "lock")
    if held:
        return "running"
    if (run / FINISHED).exists():
        return "finished"
    return {"stopped": "waiting", "failed": "failed"}.get(str(status.get("state")), "killed")


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds the lock. Trying to take the lock would disturb a run that is just
    starting, so this reads the kernel's list."""
    if not path.exists():
        return False
    about = path.stat()
    name = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    return any(line.split()[1] == "FLOCK" and name in line.split() for line in LOCKS.read_text().splitlines())


def summarize_run(run: Path) -> RunSummary:
    config = yaml.safe_load((run / CONFIG_FILE).read_text()) or {}
    steps = metrics.read_steps(run)
    scores = ("eval/accuracy", "eval/loss", "reward/mean")
    best_is = next((name for name in scores if any(name in row for row in steps)), "")
    choose = min if best_is == "eval/loss" else max
    best = choose((row for row in steps if best_is in row), key=lambda row: row[best_is], default=None)
    log = run / metrics.FILE
    return RunSummary(
        path=run,
        state=find_state(run),
        step=max((int(row["step"]) for row in steps if "loss/tokens" in row), default=0),
        steps=int(config.get("steps") or 0),
        best=best[best_is] if best is not None else None,
        best_is=best_is,
        best_step=int(best["step"]) if best is not None else 0,
        recipe=str(config.get("recipe") or config.get("description") or "-"),
        seed=config.get("seed"),
        touched_at=(log if log.exists() else run / CONFIG_FILE).stat().st_mtime,
    )


# ---- the list --------------------------------------------------------------------------------------------------------


def find_runs(folder: Path) -> list[Path]:
    """The run directories at or below ``folder``, except those inside others. Raises RunError if there is no folder."""
    if not folder.is_dir():
        do = "give the folder used as runs_dir="
        raise RunError(explain("runs", f"nothing at {folder}", "a folder with run directories", do))
    found = []
    for root, folders, _ in os.walk(folder):
        if is_run(Path(root)):
            found.append(Path(root))
            folders.clear()
        folders.sort()
    return found


def describe_runs(folder: Path) -> str:
    """A table, with the most recently active run at its end, where the eye is."""
    runs = sorted((summarize_run(run) for run in find_runs(folder)), key=lambda run: run.touched_at)
    if not runs:
        return f"{folder}: no runs"
    rows = [["run", "state", "steps", "best score", "recipe", "seed", "last active"]]
    for run in runs:
        name = str(run.path.relative_to(folder)) if run.path != folder else run.path.name
        age = f"{duration(max(0.0, time.time() - run.touched_at))} ago"
        steps = f"{run.step}/{run.steps}"
        rows.append([name, run.state, steps, _best(run), run.recipe, "-" if run.seed is None else str(run.seed), age])
    return "\n".join(_aligned(rows))


def _best(run: RunSummary) -> str:
    if run.best is None:
        return "-"
    forms = {"eval/accuracy": percent, "eval/loss": "loss {:.4f}".format, "reward/mean": "reward {:.3f}".format}
    return f"{forms[run.best_is](run.best)} (step {run.best_step})"


# ---- two runs --------------------------------------------------------------------------------------------------------


def compare_runs(first: Path, second: Path) -> str:
    """Which settings differ, and how the metrics differ over the steps that both have."""
    for run in (first, second):
        if not is_run(run):
            raise RunError(explain("runs", str(run), "a run directory", "check the path"))
    changes = changed_keys((first / CONFIG_FILE).read_text(), (second / CONFIG_FILE).read_text())
    settings = [["setting", "A", "B"], *([c.key, _short(c.before), _short(c.now)] for c in changes)]
    a, b = ({int(row["step"]): row for row in metrics.read_steps(run)} for run in (first, second))
    lines = [f"A  {first}: {find_state(first)}", f"B  {second}: {find_state(second)}", ""]
    lines += _aligned(settings) if changes else ["no setting differs"]
    rows = [["metric", "A", "B", "B - A", "over"]]
    for name in COMPARED:
        both = [step for step in sorted(a) if name in a[step] and name in b.get(step, {})]
        chosen = both[-1:] if name.startswith("eval/") else both[-COMPARED_STEPS:]
        if chosen:
            means = [sum(run[step][name] for step in chosen) / len(chosen) for run in (a, b)]
            over = f"step {chosen[-1]}" if len(chosen) == 1 else f"steps {chosen[0]} to {chosen[-1]}"
            rows.append([name, f"{means[0]:.4g}", f"{means[1]:.4g}", f"{means[1] - means[0]:+.4g}", over])
    lines += ["", *(_aligned(rows) if len(rows) > 1 else ["no common step was logged"])]
    note = _overlap(a, b)
    return "\n".join([*lines, *([note] if note else [])])


def _overlap(a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]]) -> str:
    """Whether the last common evaluation tells them apart."""
    both = [s for s in sorted(a) if "eval/accuracy" in a[s] and "eval/accuracy" in b.get(s, {})]
    if not both:
        return ""
    (low_a, high_a), (low_b, high_b) = (
        (run[both[-1]]["eval/accuracy_low"], run[both[-1]]["eval/accuracy_high"]) for run in (a, b)
    )
    apart = high_a < low_b or high_b < low_a
    word = "do not overlap" if apart else "overlap: the difference may be chance"
    return f"95 % intervals of eval/accuracy: A {_interval(low_a, high_a)}, B {_interval(low_b, high_b)}; they {word}"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _short(value: Any, most: int = 40) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
