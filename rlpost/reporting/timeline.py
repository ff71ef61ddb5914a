"""``timeline.jsonl``: the phases of every step and every stay of a sample in the engine. Reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain

FILE = "timeline.jsonl"
COLUMNS = ("uid", "index", "replica", "policy_version", "start_s", "end_s", "tokens", "kind", "end")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeline:
    """One step. ``spans`` has the columns :data:`COLUMNS`, one entry for each stay of a sample in the engine."""

    step: int
    phases: list[tuple[str, float, float]]  # name, start and end in seconds since the run began
    spans: dict[str, list[Any]]
    admitted: list[str]  # uids of the groups trained
    dropped: list[tuple[str, str]]  # (uid, how the group ended)


def read_timeline(run_dir: Path) -> list[StepTimeline]:
    """All steps with a whole line, in order; several lines of one step are put together.

    Step 0 is what came before the first step. Raises RunError where there is no timeline.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise RunError(explain("timeline", f"nothing at {path}", "a run directory with a timeline", "check the path"))
    steps: dict[int, StepTimeline] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            empty: dict[str, list[Any]] = {name: [] for name in COLUMNS}
            new = StepTimeline(step=row["step"], phases=[], spans=empty, admitted=[], dropped=[])
            step = steps.setdefault(row["step"], new)
            step.phases.extend((name, start, end) for name, start, end in row["phases"])
            for name, values in row.get("spans", {}).items():
                step.spans[name].extend(values)
            step.admitted.extend(row.get("admitted", []))
            step.dropped.extend((uid, end) for uid, end in row.get("dropped", []))
    return [steps[number] for number in sorted(steps)]
