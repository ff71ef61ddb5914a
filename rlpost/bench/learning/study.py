"""Makes the runs that are missing from the table, one after another. Called by ``cli``.

Whatever stops it (Ctrl-C, SIGTERM, a run that fails, ``--limit``, ``--minutes``): the table holds the finished runs,
the interrupted one leaves nothing, and the same command continues with the next missing one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rlpost.bench.learning.cells import Cell, all_cells
from rlpost.bench.learning.run import run_cell
from rlpost.bench.learning.settings import digest_material, digest_settings, settings_of
from rlpost.bench.learning.table import Row, append_row, read_table
from rlpost.durable.stopping import StopRequest
from rlpost.errors import ConfigError, explain
from rlpost.preflight.checks import check

TABLE = Path("docs/studies/learning.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    table: Path = TABLE
    only: Sequence[str] = ()  # patterns of cell names; none: all
    limit: int | None = None  # runs made by this call
    minutes: float | None = None  # after this many, no run is started
    core: int | None = None  # None: the last one this process may use
    runs: Path | None = None  # keeps the runs' directories; None: they are removed
    again: bool = False  # also repeat those whose rows were made on a crowded machine, once each


def say_at_once(line: str) -> None:
    """A run takes minutes, and the study's output may be a file that somebody is reading."""
    print(line, flush=True)


def run_study(plan: Plan, say: Callable[[str], None] = say_at_once) -> int:
    """The number of runs made. Raises ConfigError for a pattern that matches no cell, or settings that cannot work."""
    cells = choose_cells(plan.only)
    digests = digest_cells(cells)
    started, made = time.monotonic(), list[Cell]()
    with StopRequest(0, say):
        while True:
            rows = read_table(plan.table)
            missing = find_missing(cells, digests, rows)
            say(f"{len(cells) - len(missing)} of {len(cells)} runs are in {plan.table}")
            if plan.again:
                missing += [cell for cell in find_crowded(cells, digests, rows) if cell not in made]
            late = plan.minutes is not None and time.monotonic() - started > 60 * plan.minutes
            if not missing or late or (plan.limit is not None and len(made) >= plan.limit):
                return len(made)
            append_row(plan.table, _make(missing[0], digests[missing[0]], plan, say))
            made.append(missing[0])


def choose_cells(only: Sequence[str]) -> list[Cell]:
    cells = all_cells()
    for pattern in only:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            expected = f"a pattern of names such as {cells[0].name}"
            raise ConfigError(explain("--only", pattern, expected, "see `rlpost bench learning --list`"))
    return [cell for cell in cells if not only or any(fnmatchcase(cell.name, pattern) for pattern in only)]


def digest_cells(cells: Sequence[Cell]) -> dict[Cell, str]:
    """The digest that a row of each cell must have to count today. Checks each configuration as `rlpost train`
    would."""
    digests = {}
    material = None
    for cell in cells:
        cfg = cell.compose()
        if material is None:
            check(cfg)
            material = digest_material(cfg)
        digests[cell] = digest_settings(settings_of(cfg), material)
    return digests


def find_missing(cells: Sequence[Cell], digests: dict[Cell, str], rows: Sequence[Row]) -> list[Cell]:
    there = {row.key for row in rows}
    return [cell for cell in cells if (cell.name, digests[cell]) not in there]


def find_crowded(cells: Sequence[Cell], digests: dict[Cell, str], rows: Sequence[Row]) -> list[Cell]:
    crowded = {row.key for row in valid_rows(cells, digests, rows) if row.is_crowded}
    return [cell for cell in cells if (cell.name, digests[cell]) in crowded]


def valid_rows(cells: Sequence[Cell], digests: dict[Cell, str], rows: Sequence[Row]) -> list[Row]:
    """Those that represent a cell as it is set today; of several for one cell the last."""
    wanted = {(cell.name, digests[cell]) for cell in cells}
    return list({row.key: row for row in rows if row.key in wanted}.values())


def _make(cell: Cell, digest: str, plan: Plan, say: Callable[[str], None]) -> Row:
    core = plan.core if plan.core is not None else max(os.sched_getaffinity(0))
    folder: AbstractContextManager[str]
    if plan.runs is not None:
        plan.runs.mkdir(parents=True, exist_ok=True)
        folder = nullcontext(str(plan.runs))
    else:
        folder = tempfile.TemporaryDirectory(prefix="rlpost-learning-")
    say(f"{cell.name} starts on core {core}")
    with folder as path:
        row = run_cell(cell, digest=digest, folder=Path(path), core=core)
    say(
        f"{cell.name}: {100 * row.final.accuracy:.1f} % of {row.final.num_judged} responses correct after "
        f"{row.samples:,} samples; training took {row.cpu_s:.0f} s of CPU time ({row.wall_s:.0f} s elapsed), "
        f"the whole run {row.total_cpu_s + row.eval_cpu_s:.0f} s of CPU time"
    )
    return row
