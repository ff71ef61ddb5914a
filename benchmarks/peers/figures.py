"""What is made of the runs: rates, time to an accuracy, medians over seeds, ratios seed by seed, the table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.records import Evaluation, Run, Time


def rate(run: Run, what: str, clock: str) -> float:
    """``samples`` or ``tokens`` a second of ``wall_s`` or ``cpu_s``, over all steps but the first."""
    first, last = run.steps[0], run.steps[-1]
    amount = sum(getattr(step, what) for step in run.steps[1:])
    return amount / (getattr(last.time, clock) - getattr(first.time, clock))


def generating_share(run: Run) -> float:
    """Per cent of the training time that generation took, over all steps but the first."""
    seconds = run.steps[-1].time.wall_s - run.steps[0].time.wall_s
    return 100 * sum(step.generate_s for step in run.steps[1:]) / seconds


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
    """Median, smallest and largest over seeds; ``missing`` seeds have no figure and count as the largest, ``undecided``
    ones do not count."""

    values: tuple[float, ...]
    missing: int = 0
    undecided: int = 0

    @property
    def median(self) -> float | None:
        everything = [*self.values, *[float("inf")] * self.missing]
        middle = statistics.median(everything) if everything else float("inf")
        return None if middle == float("inf") else middle

    def text(self, digits: int = 1) -> str:
        if self.undecided and not self.values:
            return "an undecided number of"
        if self.median is None:
            return f"not reached ({self.missing} of {self.missing + len(self.values)} seeds)"
        low, high = min(self.values), max(self.values)
        top = f"{high:.{digits}f}" if not self.missing else "not reached"
        seeds = len(self.values) + self.undecided
        left_out = f"; {self.undecided} of {seeds} seeds undecided" if self.undecided else ""
        return f"{self.median:.{digits}f} ({low:.{digits}f} to {top}{left_out})"


def spread(values: Sequence[float | None]) -> Spread:
    known = tuple(value for value in values if value is not None)
    return Spread(values=known, missing=len(values) - len(known))


# ---- the table


def summarize(runs: Sequence[Run], *, accuracy: float, baseline: str) -> dict[str, Any]:
    """Medians and spreads over seeds for each row, and ratios to the row ``baseline``, seed by seed.

    A ratio above 1 says that the row is faster than ``baseline``: rates over its rates, its times over the row's. A
    seed in which neither reached ``accuracy`` has no ratio of times and is counted in ``undecided``. ``of_medians`` is
    the baseline's median time over the row's, None where one of them is not reached.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    figures = {name: _figures([run for run in runs if run.name == name], accuracy) for name in names}
    by_seed = {(run.name, run.seed): run for run in runs}
    seeds = sorted({run.seed for run in runs if (baseline, run.seed) in by_seed})
    ratios, of_medians = {}, dict[str, float | None]()
    for name in names:
        if name == baseline:
            continue
        pairs = [(by_seed[name, seed], by_seed[baseline, seed]) for seed in seeds if (name, seed) in by_seed]
        ratios[name] = {
            "samples_per_s": spread([rate(a, "samples", "wall_s") / rate(b, "samples", "wall_s") for a, b in pairs]),
            "seconds_to": _ratios_to(pairs, accuracy, "wall_s"),
            "cpu_seconds_to": _ratios_to(pairs, accuracy, "cpu_s"),
        }
        own, other = figures[name]["seconds_to"].median, figures[baseline]["seconds_to"].median
        of_medians[name] = None if own is None or other is None else other / own
    return {"accuracy": accuracy, "baseline": baseline, "figures": figures, "ratios": ratios, "of_medians": of_medians}


def _figures(runs: Sequence[Run], accuracy: float) -> dict[str, Spread]:
    return {
        "samples_per_s": spread([rate(run, "samples", "wall_s") for run in runs]),
        "tokens_per_s": spread([rate(run, "tokens", "wall_s") for run in runs]),
        "generating": spread([generating_share(run) for run in runs]),
        "seconds_to": spread([seconds_to(run, accuracy, "wall_s") for run in runs]),
        "cpu_seconds_to": spread([seconds_to(run, accuracy, "cpu_s") for run in runs]),
        "seconds_to_with_start": spread(
            [None if (to := seconds_to(run, accuracy, "wall_s")) is None else run.start_s + to for run in runs]
        ),
        "samples_to": spread([samples_to(run, accuracy) for run in runs]),
        "final_accuracy": spread([100 * run.evaluations[-1].accuracy for run in runs]),
    }


def _ratios_to(pairs: Sequence[tuple[Run, Run]], accuracy: float, clock: str) -> Spread:
    ratios = [_ratio_to(run, baseline, accuracy, clock) for run, baseline in pairs]
    known = tuple(ratio for ratio in ratios if ratio is not None)
    return Spread(values=known, undecided=len(ratios) - len(known))


def _ratio_to(run: Run, baseline: Run, accuracy: float, clock: str) -> float | None:
    """0 where only ``baseline`` reached it; where only ``run`` did, the baseline's whole time is taken."""
    own, other = seconds_to(run, accuracy, clock), seconds_to(baseline, accuracy, clock)
    if own is None:
        return None if other is None else 0.0
    if other is None:
        other = float(getattr(baseline.steps[-1].time, clock))
    return other / own


COLUMNS = {
    "samples_per_s": ("samples/s", 1),
    "tokens_per_s": ("tokens/s", 0),
    "generating": ("generating, %", 0),
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
        of_medians = summary["of_medians"][name]
        by_medians = "no ratio" if of_medians is None else f"{of_medians:.2f}"
        lines.append(
            f"- {name} over {summary['baseline']}, seed by seed: {ratios['seconds_to'].text(2)} x as fast to {percent} "
            f"({by_medians} of the median times; {ratios['cpu_seconds_to'].text(2)} by CPU time), "
            f"{ratios['samples_per_s'].text(2)} x the samples/s"
        )
    return "\n".join(lines) + "\n"
