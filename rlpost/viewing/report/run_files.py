"""The contents of a run directory as plain containers. Only reads files, and copes with missing ones.

``metrics.jsonl`` and, for a deterministic run, ``timings.jsonl`` beside it, are joined to one row per step and one per
evaluation. Called by ``build``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpost.durable.run_dir import FINISHED
from rlpost.durable.run_state import CONFIG_FILE
from rlpost.errors import RunError, explain
from rlpost.reporting.metrics import FILE, TIMES_FILE
from rlpost.reporting.timeline import FILE as TIMELINE_FILE
from rlpost.reporting.timeline import StepTimeline, read_timeline

WARNINGS_FILE = "warnings.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """``steps`` and ``evals`` are ordered by step; a number that was not finite is None in them."""

    path: Path
    name: str
    steps: list[Row]  # the step's metrics, with the times of its checkpoint and of the evaluation after it
    evals: list[Row]  # with the totals of the step they came after
    replay: Row  # replay/*, logged once
    config: dict[str, Any]  # resolved; empty if the run died before it was written
    summary: dict[str, Any] | None  # finished.json; None while a run is unfinished
    warnings: list[Row]  # step, name, text
    timeline: list[StepTimeline]


def read_run(path: Path) -> RunFiles:
    """Everything except the rollouts, which are large.

    Raises:
        RunError: ``path`` is not a run directory, or one of its files has unexpected contents.
    """
    if not (path / FILE).is_file() and not (path / CONFIG_FILE).is_file():
        what = "a folder without metrics.jsonl" if path.is_dir() else "nothing there"
        raise RunError(explain("report", f"{path} ({what})", "a run directory, such as runs/NAME", "check the path"))
    try:
        lines = [*_read_lines(path / FILE), *_read_lines(path / TIMES_FILE)]
        config = yaml.safe_load((path / CONFIG_FILE).read_text()) if (path / CONFIG_FILE).is_file() else {}
        summary = json.loads((path / FINISHED).read_text()) if (path / FINISHED).is_file() else None
        warnings = _read_lines(path / WARNINGS_FILE)
        timeline = read_timeline(path) if (path / TIMELINE_FILE).is_file() else []
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = f"{path} ({type(error).__name__}: {error})"
        raise RunError(explain("report", reason, "files as written by rlpost train", "fix or remove it")) from error
    steps, evals, replay = join_lines(lines)
    return RunFiles(
        path=path,
        name=path.resolve().name,
        steps=steps,
        evals=evals,
        replay=replay,
        config=config or {},
        summary=summary,
        warnings=warnings,
        timeline=timeline,
    )


def join_lines(lines: Iterable[Mapping[str, Any]]) -> tuple[list[Row], list[Row], Row]:
    """(steps, evaluations, replay) from the lines of both logs, which may be mixed.

    A step is saved, evaluated and replayed on separate lines, under its number; ``time/save`` and ``time/eval`` go into
    the step's row, the other numbers of an evaluation into a row of the evaluations.
    """
    kinds: dict[str, dict[int, Row]] = {"step": {}, "eval": {}, "save": {}, "replay": {}}
    for line in lines:
        by_step = kinds[_kind_of(line)]
        by_step[line["step"]] = by_step.get(line["step"], {}) | dict(line)
    steps = [row for _, row in sorted(kinds["step"].items())]
    for row in steps:
        for kind in ("save", "eval"):
            spent = kinds[kind].get(row["step"], {}).get(f"time/{kind}")
            if spent is not None:
                row[f"time/{kind}"] = spent
    totals = {row["step"]: {n: v for n, v in row.items() if n.startswith("total/")} for row in steps}
    nothing = {"total/samples": 0, "total/tokens": 0}
    evals = [row | totals.get(step, {} if step else nothing) for step, row in sorted(kinds["eval"].items())]
    replay: Row = {}
    for row in kinds["replay"].values():
        replay |= {name: value for name, value in row.items() if name.startswith("replay/")}
    return steps, evals, replay


def _kind_of(line: Mapping[str, Any]) -> str:
    if any(name.startswith("eval/") for name in line) or "time/eval" in line:
        return "eval"
    if "time/save" in line and "time/step" not in line:
        return "save"
    if any(name.startswith("replay/") for name in line):
        return "replay"
    return "step"


def _read_lines(file: Path) -> list[Row]:
    """Complete lines of JSON, without the torn last one of a killed process. None if there is no file."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]
