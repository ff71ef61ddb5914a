"""What a run of either framework leaves behind, and what is made of it: steps, evaluations, times, medians, the table.

Times are read off a :class:`Clock` that starts with the loop (model and engine are up), runs through everything a step
does and stands still while the model is evaluated. Pure but for the clock; imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import statistics
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


def read_trl_log(history: Sequence[Mapping[str, Any]], times: Sequence[Time], samples: int) -> list[Step]:
    """Steps from ``TrainerState.log_history`` (``logging_steps=1``), one of ``times`` each.

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
        )
        for row, at in zip(rows, times, strict=True)
    ]


# ---- what is made of a run


def rate(run: Run, what: str, clock: str) -> float:
    """``samples`` or ``tokens`` a second of ``wall_s`` or ``cpu_s``, over all steps but the first."""
    first, last = run.steps[0], run.steps[-1]
    amount = sum(getattr(step, what) for step in run.steps[1:])
    return amount / (getattr(last.time, clock) - getattr(first.time, clock))


def seconds_to(run: Run, accuracy: float, clock: str) -> float | None:
    """Training time until ``accuracy`` on the held-out problems; None: it was not reached.

    Between the first evaluation that reaches it and the one before, time runs linearly with accuracy. ``start_s`` is
    not in it.
    """
    before: Evaluation | None = None
    for evaluation in run.evaluations:
        at = float(getattr(evaluation.time, clock))
        if evaluation.accuracy >= accuracy:
            if before is None:
                return at
            share = (accuracy - before.accuracy) / (evaluation.accuracy - before.accuracy)
            earlier = float(getattr(before.time, clock))
            return earlier + share * (at - earlier)
        before = evaluation
    return None


def samples_to(run: Run, accuracy: float) -> float | None:
    """Trained samples until ``accuracy``, by the same rule as :func:`seconds_to`."""
    trained = {0: 0} | {step.step: 0 for step in run.steps}
    total = 0
    for step in run.steps:
        total += step.samples
        trained[step.step] = total
    counted = [
        Evaluation(step=e.step, accuracy=e.accuracy, time=Time(wall_s=trained[e.step], cpu_s=trained[e.step]))
        for e in run.evaluations
    ]
    return seconds_to(Run(name=run.name, seed=run.seed, evaluations=counted), accuracy, "wall_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, smallest and largest over seeds; ``missing`` seeds have no figure and count as the largest."""

    values: tuple[float, ...]
    missing: int = 0

    @property
    def median(self) -> float | None:
        everything = [*self.values, *[float("inf")] * self.missing]
        middle = statistics.median(everything) if everything else float("inf")
        return None if middle == float("inf") else middle

    def text(self, digits: int = 1) -> str:
        if self.median is None:
            return f"not reached ({self.missing} of {self.missing + len(self.values)} seeds)"
        low, high = min(self.values), max(self.values)
        top = f"{high:.{digits}f}" if not self.missing else "not reached"
        return f"{self.median:.{digits}f} ({low:.{digits}f} to {top})"


def spread(values: Sequence[float | None]) -> Spread:
    known = tuple(value for value in values if value is not None)
    return Spread(values=known, missing=len(values) - len(known))


# ---- the table


def summarize(runs: Sequence[Run], *, accuracy: float, baseline: str) -> dict[str, Any]:
    """Medians and spreads over seeds for each row, and ratios to the row ``baseline``, seed by seed.

    A ratio above 1 says that the row is faster than ``baseline``: rates over its rates, its times over the row's.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    figures = {name: _figures([run for run in runs if run.name == name], accuracy) for name in names}
    by_seed = {(run.name, run.seed): run for run in runs}
    seeds = sorted({run.seed for run in runs if (baseline, run.seed) in by_seed})
    ratios = {}
    for name in names:
        if name == baseline:
            continue
        pairs = [(by_seed[name, seed], by_seed[baseline, seed]) for seed in seeds if (name, seed) in by_seed]
        ratios[name] = {
            "samples_per_s": spread([rate(a, "samples", "wall_s") / rate(b, "samples", "wall_s") for a, b in pairs]),
            "seconds_to": spread([_ratio_to(a, b, accuracy, "wall_s") for a, b in pairs]),
            "cpu_seconds_to": spread([_ratio_to(a, b, accuracy, "cpu_s") for a, b in pairs]),
        }
    return {"accuracy": accuracy, "baseline": baseline, "figures": figures, "ratios": ratios}


def _figures(runs: Sequence[Run], accuracy: float) -> dict[str, Spread]:
    return {
        "samples_per_s": spread([rate(run, "samples", "wall_s") for run in runs]),
        "tokens_per_s": spread([rate(run, "tokens", "wall_s") for run in runs]),
        "seconds_to": spread([seconds_to(run, accuracy, "wall_s") for run in runs]),
        "cpu_seconds_to": spread([seconds_to(run, accuracy, "cpu_s") for run in runs]),
        "seconds_to_with_start": spread(
            [None if (to := seconds_to(run, accuracy, "wall_s")) is None else run.start_s + to for run in runs]
        ),
        "samples_to": spread([samples_to(run, accuracy) for run in runs]),
        "final_accuracy": spread([100 * run.evaluations[-1].accuracy for run in runs]),
    }


def _ratio_to(run: Run, baseline: Run, accuracy: float, clock: str) -> float | None:
    own, other = seconds_to(run, accuracy, clock), seconds_to(baseline, accuracy, clock)
    return None if own is None or other is None else other / own


COLUMNS = {
    "samples_per_s": ("samples/s", 1),
    "tokens_per_s": ("tokens/s", 0),
    "seconds_to": ("s to {accuracy}", 0),
    "cpu_seconds_to": ("CPU s to {accuracy}", 0),
    "seconds_to_with_start": ("with start, s", 0),
    "samples_to": ("samples to {accuracy}", 0),
    "final_accuracy": ("last accuracy, %", 1),
}


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table and a line for each ratio: medians, in brackets the smallest and largest seed."""
    percent = f"{100 * summary['accuracy']:.0f} %"
    titles = [title.format(accuracy=percent) for title, _ in COLUMNS.values()]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, figures in summary["figures"].items():
        cells = [figures[key].text(digits) for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, ratios in summary["ratios"].items():
        lines.append(
            f"- {name} over {summary['baseline']}, seed by seed: {ratios['seconds_to'].text(2)} x as fast to {percent} "
            f"({ratios['cpu_seconds_to'].text(2)} by CPU time), {ratios['samples_per_s'].text(2)} x the samples/s"
        )
    return "\n".join(lines) + "\n"
