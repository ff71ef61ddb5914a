"""What a run of either framework leaves behind: steps and evaluations with their times.

Times are read off a :class:`Clock` that starts with the loop (model and engine are up), runs through everything a step
does and stands still while the model is evaluated. Pure but for the clock; imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """Seconds of training: on the wall, and of this process's CPU time, which other programs do not lengthen."""

    wall_s: float
    cpu_s: float


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._start = _now()
        self._paused = Time(wall_s=0.0, cpu_s=0.0)

    def read(self) -> Time:
        return _minus(_minus(_now(), self._start), self._paused)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self.read()
        try:
            yield
        finally:
            grown = _minus(self.read(), before)
            self._paused = Time(wall_s=self._paused.wall_s + grown.wall_s, cpu_s=self._paused.cpu_s + grown.cpu_s)


def _now() -> Time:
    return Time(wall_s=time.perf_counter(), cpu_s=time.process_time())


def _minus(a: Time, b: Time) -> Time:
    return Time(wall_s=a.wall_s - b.wall_s, cpu_s=a.cpu_s - b.cpu_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step: what was trained, and the clock at its end."""

    step: int  # 1 is the first
    time: Time
    samples: int  # trained
    tokens: int  # of responses, trained
    reward: float  # mean
    generate_s: float  # wall seconds of it in generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    step: int  # steps done before it
    time: Time
    accuracy: float  # mean@k on the held-out problems


@dataclass(kw_only=True, slots=True)
class Run:
    name: str  # the table's row
    seed: int
    start_s: float = 0.0  # wall seconds from the start of the process until the loop began
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # versions, settings that only one side has

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_run(path: Path) -> Run:
    row = json.loads(path.read_text(encoding="utf-8"))
    row["steps"] = [Step(**step | {"time": Time(**step["time"])}) for step in row["steps"]]
    row["evaluations"] = [Evaluation(**e | {"time": Time(**e["time"])}) for e in row["evaluations"]]
    return Run(**row)


def read_trl_log(
    history: Sequence[Mapping[str, Any]], times: Sequence[Time], generate_s: Sequence[float], samples: int
) -> list[Step]:
    """Steps from ``TrainerState.log_history`` (``logging_steps=1``), one of ``times`` and ``generate_s`` each.

    Raises ValueError where a step is missing from the log or was logged twice.
    """
    rows = [row for row in history if "completions/mean_length" in row]
    if [row["step"] for row in rows] != list(range(1, len(times) + 1)):
        raise ValueError(f"TRL's log has steps {[row['step'] for row in rows]}; expected 1 to {len(times)}")
    return [
        Step(
            step=row["step"],
            time=at,
            samples=samples,
            tokens=round(row["completions/mean_length"] * samples),
            reward=row["reward"],
            generate_s=seconds,
        )
        for row, at, seconds in zip(rows, times, generate_s, strict=True)
    ]
