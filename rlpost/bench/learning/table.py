"""The study's table: one finished run a line, as JSON, in a file that is committed. Rows are appended, never changed.

``study`` appends, ``analysis`` reads. Several processes may append to one file; a row that another one has put there
meanwhile is not put there twice. Only a row made in a crowd may be followed by another of its run, which then counts.
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

CROWDED = 1.2  # the clock over CPU time: above it other programs had the core, and their caches cost CPU time, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One evaluation on the held-out problems. Times are those of training alone, summed up to here: publication,
    generation and update; start, evaluation and saving left out."""

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
    """A finished run. Shares are of 1; ``mean over steps`` where nothing else is said."""

    cell: str
    algo: str
    seed: int
    oversample: float
    max_staleness: int
    corrected: bool
    digest: str  # of the settings, see ``settings``
    revision: str  # of the program: a commit, with + where files differed from it; else the version
    versions: dict[str, str]  # of torch, vllm and deepspeed
    date: str  # ISO 8601, UTC, when the run began
    machine: str
    load_before: float  # load average over a minute
    load_after: float
    samples: int  # trained
    tokens: int
    wall_s: float  # of training, as in Point
    cpu_s: float
    total_wall_s: float  # of the whole process, start and evaluations on the way included; the last evaluation apart
    total_cpu_s: float
    eval_cpu_s: float  # of the process that evaluated the trained model
    curve: list[Point]  # on the way, one response a problem; the last one is of the trained model
    final: Point  # the trained model, mean@4, in a process of its own
    final_problems: int
    right_tokens: float  # mean length of its right responses
    wrong_tokens: float
    reward: list[float]  # mean of the samples trained, by step
    length: list[float]  # their mean length, tokens, by step
    carried_share: float  # of the tokens trained, those of older versions
    lag_shares: dict[str, float]  # of the tokens trained, by version lag
    lag_abs_log_ratio: dict[str, float]  # mean abs(old_logprobs - rollout_logprobs), nats, by version lag
    changed_share: float  # of the tokens trained, those whose weight the correction truncated
    clip_low_share: float  # tokens (GSPO: sequences) clipped
    clip_high_share: float
    approx_kl: float
    idle_share: float
    discarded_share: float  # of the tokens generated: filtered groups

    @property
    def key(self) -> tuple[str, str]:
        return self.cell, self.digest

    @property
    def slower(self) -> float:
        """By how much the clock's time of training exceeded the CPU's."""
        return self.wall_s / self.cpu_s

    @property
    def is_crowded(self) -> bool:
        """Whether its times say more of its neighbors than of the program; what it learned is right all the same."""
        return self.slower > CROWDED

    @property
    def accuracy_curve(self) -> list[Point]:
        """The curve with the exact evaluation at its end."""
        return [*self.curve[:-1], self.final]


def read_table(path: Path) -> list[Row]:
    """All rows, oldest first; none where there is no file. Raises DataError for a line that is no row."""
    if not path.exists():
        return []
    return [_read(line, number, path) for number, line in enumerate(path.read_text().splitlines(), 1)]


def append_row(path: Path, row: Row) -> bool:
    """On disk when this returns; False where a row of this cell and digest, made in no crowd, was there already."""
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
        do = "take the line out, or the file from version control"
        raise DataError(explain(f"{path}, line {number}", str(error), expected, do)) from None


def _rounded(value: Any) -> Any:
    """Six significant digits are more than anything here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value
