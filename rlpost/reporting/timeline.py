"""``timeline.jsonl``: one line a step, the phases and every stay of a sample in the engine. Reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "timeline.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeline:
    """One step. Times are seconds since the run began, pauses between lives left out.

    ``spans`` holds columns of equal length, one entry for each stay of a sample in the engine: uid, index, replica,
    policy_version, start_s, end_s, tokens, kind (launched or resumed), end (paused, stop or length).
    """

    step: int
    phases: list[tuple[str, float, float]]
    spans: Mapping[str, list[Any]]
    admitted: list[str]
    dropped: list[tuple[str, str]]


def read_timeline(run_dir: Path) -> list[StepTimeline]:
    """All whole lines, oldest first; none where the file is absent."""
    file = Path(run_dir) / FILE
    if not file.is_file():
        return []
    steps = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            row["phases"] = [(name, start, end) for name, start, end in row["phases"]]
            row["dropped"] = [(uid, why) for uid, why in row["dropped"]]
            steps.append(StepTimeline(**row))
    return steps
