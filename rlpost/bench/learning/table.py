"""The study's table: one finished run per line, as JSON, in a file under version control. Rows are only appended.

``study`` appends, ``analysis`` reads. Several processes may append to one file; a row that another process has added in
the meantime is not added twice. Only a row made on a crowded machine may be followed by another one for its run, which
then counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlpost.errors import DataError, explain

CROWDED = 1.2  # elapsed over CPU time: above it other programs used the core, and their cache misses cost CPU time, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One evaluation on the held-out problems. Times are those of training alone, summed up to this point: publication,
    generation and update; without start, evaluation and saving."""

    step: int
    samples: int  # trained so far
    wall_s: float
    cpu_s: float  # of the run's process; what wall_s would be on a core that nothing else uses
    num_correct: int
    num_judged: int
    response_tokens: float  # mean
    truncated_share: float = 0.0

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A finished run. Shares are fractions of 1; values are means over steps unless noted otherwise."""

    cell: str
    algo: str
    seed: int
    oversample: float
    max_staleness: int
    corrected: bool
    digest: str  # of the settings, see ``settings``
    revision: str  # of the program: a commit, with + if files differed from it; else the version
    versions: dict[str, str]  # of torch, vllm and deepspeed
    date: str  # ISO 8601, UTC, when the run began
    machine: str
    load_before: float  # load average over a minute
    load_after: float
    samples: int  # trained
    tokens: int
    wall_s: float  # of training, as in Point
    cpu_s: float
    total_wall_s: float  # of the whole process, including start and intermediate evaluations, without the final one
    total_cpu_s: float
    eval_cpu_s: float  # of the process that evaluated the trained model
    curve: list[Point]  # during the run, one response per problem; the last one is of the trained model
    final: Point  # the trained model, mean@4, in a separate process
    final_problems: int
    right_tokens: float  # mean length of its correct responses
    wrong_tokens: float
    reward: list[float]  # mean of the trained samples, by step
    length: list[float]  # their mean length, tokens, by step
    carried_share: float  # of the trained tokens, those of older versions
    lag_shares: dict[str, float]  # of the trained tokens, by version lag
    lag_abs_log_ratio: dict[str, float]  # mean abs(old_logprobs - rollout_logprobs), nats, by version lag
    changed_share: float  # of the trained tokens, those whose weight the correction truncated
    clip_low_share: float  # tokens (GSPO: sequences) clipped
    clip_high_share: float
    approx_kl: float
    idle_share: float
    discarded_share: float  # of the generated tokens: filtered groups

    @property
    def key(self) -> tuple[str, str]:
        return self.cell, self.digest

    @property
    def slower(self) -> float:
        """Elapsed time of training over its CPU time."""
        return self.wall_s / self.cpu_s

    @property
    def is_crowded(self) -> bool:
        """Whether its times reflect other programs more than this one; what it learned is valid all the same."""
        return self.slower > CROWDED

    @property
    def accuracy_curve(self) -> list[Point]:
        """The curve with the exact evaluation at its end."""
        return [*self.curve[:-1], self.final]


def read_table(path: Path) -> list[Row]:
    """All rows, oldest first; none if there is no file. Raises DataError for an invalid line."""
    if not path.exists():
        return []
    return [_read(line, number, path) for number, line in enumerate(path.read_text().splitlines(), 1)]


def append_row(path: Path, row: Row) -> bool:
    """On disk when this returns; False if a row of this cell and digest, not made on a crowded machine, already
    exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if any(other.key == row.key and not other.is_crowded for other in read_table(path)):
            return False
        file.write(json.dumps(_rounded(asdict(row)), separators=(", ", ": ")) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _read(line: str, number: int, path: Path) -> Row:
    try:
        values = json.loads(line)
        values["curve"] = [Point(**point) for point in values["curve"]]
        values["final"] = Point(**values["final"])
        return Row(**values)
    except (ValueError, TypeError, KeyError) as error:
        expected = f"a row with {', '.join(f.name for f in fields(Row))}"
        do = "remove the line, or restore the file from version control"
        raise DataError(explain(f"{path}, line {number}", str(error), expected, do)) from None


def _rounded(value: Any) -> Any:
    """Six significant digits are more precision than anything here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value
