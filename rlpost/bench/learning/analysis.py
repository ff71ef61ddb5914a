"""What the table shows: strategies compared in pairs of runs with the same seed, at equal samples and at equal time.

A difference is in points of accuracy, strategy minus synchronous. Its interval is Student's t over seeds, two-sided
95 %, so its lower end is the bound of a one-sided 97.5 % statement. *No worse* is only claimed for a comparison whose
seeds, fixed in advance, are all present, and only if the lower end is above -2 points; otherwise it is *not shown*.
Intervals of unfinished comparisons are printed, but nothing is concluded from them: checking after each seed and
stopping at a good one would invalidate any bound. Pure functions; called by ``page`` and ``figures``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlpost.bench.learning.cells import SEEDS, STRATEGIES, SYNC, Cell, main_cell
from rlpost.bench.learning.table import Point, Row
from rlpost.evaluation.intervals import Interval, t_interval

MARGIN = -2.0  # points: a loss greater than this counts as worse
NO_WORSE, NOT_SHOWN = "no worse", "not shown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One strategy versus another over the seeds that both have."""

    algo: str
    strategy: str
    baseline: str
    seeds: tuple[int, ...]
    num_planned: int
    points: tuple[float, ...]  # one per seed
    interval: Interval | None  # None with fewer than two seeds

    @property
    def is_complete(self) -> bool:
        return len(self.seeds) == self.num_planned

    @property
    def conclusion(self) -> str:
        shown = self.is_complete and self.interval is not None and self.interval.low > MARGIN
        return NO_WORSE if shown else NOT_SHOWN


def compare(rows: Sequence[Row], algo: str, strategy: str, baseline: str = SYNC, *, at: str = "samples") -> Difference:
    """``at``: "samples", when both have trained the same number, at the end of the run; or "time", when the slower one
    of a pair has spent as much CPU time on training as the faster one's whole run took. Times from two machines, or
    from a crowded one, cannot be compared: pairs not made on one machine, or made on a crowded one, are excluded
    then."""
    assert at in ("samples", "time")
    mine, theirs = (by_seed(rows, algo, name) for name in (strategy, baseline))
    pairs = sorted(mine.keys() & theirs.keys())
    seeds = tuple(s for s in pairs if at == "samples" or _times_compare(mine[s], theirs[s]))
    points = tuple(_difference(mine[seed], theirs[seed], at) for seed in seeds)
    return Difference(
        algo=algo,
        strategy=strategy,
        baseline=baseline,
        seeds=seeds,
        num_planned=len(SEEDS[algo]),
        points=points,
        interval=t_interval(points) if len(points) > 1 else None,
    )


def _times_compare(one: Row, other: Row) -> bool:
    return one.machine == other.machine and not (one.is_crowded or other.is_crowded)


def behind(rows: Sequence[Row], algo: str, strategy: str, baseline: str = SYNC) -> Interval | None:
    """How many rollouts later a strategy reaches the accuracy it has: mean over a run's evaluations except the first,
    t interval over seeds, None with fewer than two. If the other run never gets there, its end is used, which
    understates a lead; so it is measured in both directions and halved, and of two equal runs neither is behind."""
    mine, theirs = (by_seed(rows, algo, name) for name in (strategy, baseline))
    means = [_mean_behind(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return t_interval(means) if len(means) > 1 else None


def _mean_behind(mine: Row, theirs: Row) -> float:
    per_rollout = mine.final.samples / mine.final.step
    return (_mean_delay(mine, theirs) - _mean_delay(theirs, mine)) / 2 / per_rollout


def _mean_delay(late: Row, early: Row) -> float:
    """Samples."""
    points = late.accuracy_curve[1:]
    return sum(point.samples - samples_at(early.accuracy_curve, point.accuracy) for point in points) / len(points)


def samples_at(curve: Sequence[Point], accuracy: float) -> float:
    """Where the curve first reaches it, linear between two evaluations; its end if it never does."""
    for before, after in pairwise(curve):
        if before.accuracy >= accuracy:
            return before.samples
        if after.accuracy >= accuracy:
            share = (accuracy - before.accuracy) / (after.accuracy - before.accuracy)
            return before.samples + share * (after.samples - before.samples)
    return curve[-1].samples


def by_seed(rows: Sequence[Row], algo: str, strategy: str) -> dict[int, Row]:
    """The rows of the main cells of one algorithm and strategy."""
    names = {main_cell(algo, strategy, seed).name: seed for seed in SEEDS[algo]}
    return {names[row.cell]: row for row in rows if row.cell in names}


def comparisons() -> list[tuple[str, str, str]]:
    """(algorithm, strategy, baseline) of every comparison: both forms of APRIL with synchronous."""
    return [(algo, strategy, SYNC) for algo in SEEDS for strategy in STRATEGIES if strategy != SYNC]


def _difference(mine: Row, theirs: Row, at: str) -> float:
    if at == "samples":
        return 100 * (mine.final.accuracy - theirs.final.accuracy)
    cpu_s = min(mine.cpu_s, theirs.cpu_s)
    return 100 * (accuracy_at(mine.accuracy_curve, cpu_s) - accuracy_at(theirs.accuracy_curve, cpu_s))


def accuracy_at(curve: Sequence[Point], position: float, axis: str = "cpu_s") -> float:
    """Linear between two evaluations, constant outside them; ``axis``: samples, wall_s or cpu_s."""
    xs = [getattr(point, axis) for point in curve]
    after = bisect_right(xs, position)
    if after in (0, len(curve)):
        return curve[min(after, len(curve) - 1)].accuracy
    left, right = curve[after - 1], curve[after]
    share = (position - xs[after - 1]) / (xs[after] - xs[after - 1])
    return left.accuracy + share * (right.accuracy - left.accuracy)


@dataclass(frozen=True, slots=True)
class Band:
    """Mean over seeds at several positions of an axis, and its 95 % t interval if there are at least three seeds: with
    two, the interval is useless."""

    positions: list[float]
    mean: list[float]
    low: list[float] | None
    high: list[float] | None
    num_seeds: int


def band_of(rows: Sequence[Row], axis: str, *, num_positions: int = 40) -> Band:
    """Over the rows of one algorithm and strategy (one per seed), up to the end of the shortest."""
    end = min(getattr(row.final, axis) for row in rows)
    if axis == "samples":  # evaluated at the same numbers of samples: nothing to interpolate
        positions = sorted({float(p.samples) for row in rows for p in row.curve if p.samples <= end})
    else:
        positions = [end * n / (num_positions - 1) for n in range(num_positions)]
    values = [[accuracy_at(row.accuracy_curve, x, axis) for row in rows] for x in positions]
    means = [sum(v) / len(v) for v in values]
    if len(rows) < 3:
        return Band(positions, means, None, None, len(rows))
    intervals = [t_interval(v) for v in values]
    return Band(positions, means, [i.low for i in intervals], [i.high for i in intervals], len(rows))


def explored(rows: Sequence[Row], cells: Sequence[Cell]) -> dict[tuple[float, int, bool], list[Row]]:
    """(oversample, staleness, corrected) -> the available rows."""
    cell_of = {cell.name: cell for cell in cells}
    found: dict[tuple[float, int, bool], list[Row]] = {}
    for row in rows:
        cell = cell_of.get(row.cell)
        if cell is not None:
            found.setdefault((cell.oversample, cell.max_staleness, cell.corrected), []).append(row)
    return found


def last_gain(row: Row) -> float:
    """Points of held-out accuracy gained since the second-to-last evaluation. Above 0, learning had not ended."""
    return 100 * (row.final.accuracy - row.curve[-2].accuracy)
