"""From run directories to the page: reads each run, aggregates the charts' data, packs it, writes one file.

Owns the share of the page's size that each part gets. ``cli`` calls :func:`write_report`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost import __version__
from rlpost.errors import RunError, explain
from rlpost.reporting import metric_names, thresholds
from rlpost.viewing.report import lengths, tokens
from rlpost.viewing.report.blocks import Blocks, encode
from rlpost.viewing.report.experiments import differences, flatten, group_seeds, name_experiments
from rlpost.viewing.report.page import render
from rlpost.viewing.report.rollout_blocks import Rollouts, lengths_by_step, pack_rollouts
from rlpost.viewing.report.run_files import Row, RunFiles, read_run
from rlpost.viewing.report.timeline_blocks import pack_timeline

MAX_BYTES = 20_000_000  # of the whole file
TIMELINE_SHARE = 0.25  # of what the numbers and the page itself leave; the rollouts get the rest
OWN_BYTES = 200_000  # the page without data
MAX_STEPS = 5000  # of a run's curves; for a longer run every second step is drawn, or every third, ...
FILE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was written. The counts are sums over the runs."""

    path: Path
    num_bytes: int
    num_rollouts: int
    num_rollouts_shown: int

    def __str__(self) -> str:
        shown = f"{self.num_rollouts_shown:,} of {self.num_rollouts:,} rollouts, sampled evenly"
        if self.num_rollouts_shown == self.num_rollouts:
            shown = f"{self.num_rollouts:,} rollouts"
        return f"{self.path}: {self.num_bytes / 1e6:.1f} MB, {shown}; open it in a browser"


def write_report(run_dirs: Sequence[Path], out: Path | None = None, *, max_bytes: int = MAX_BYTES) -> Report:
    """One page about ``run_dirs``, in ``out`` (else in the run's folder, or in the current one if there are several).

    Raises:
        RunError: a folder is not a run directory, or the output cannot be written.
    """
    runs = [read_run(path) for path in unique(run_dirs)]
    out = out or (runs[0].path / FILE if len(runs) == 1 else Path(FILE))
    blocks = Blocks()
    overview = [_overview(run) for run in runs]
    left = max_bytes - OWN_BYTES - len(encode(overview))
    share = max(0, left // len(runs))
    packed = []
    for run, data in zip(runs, overview, strict=True):
        before = blocks.num_bytes
        data["timeline"] = pack_timeline(run.timeline, blocks, int(TIMELINE_SHARE * share))
        rollouts = pack_rollouts(run.path, blocks, share - (blocks.num_bytes - before))
        data["rollouts"] = _describe_rollouts(rollouts, blocks)
        packed.append(rollouts)
    html = render(_compare(runs, overview), blocks, title=", ".join(run.name for run in runs))
    _write(out, html)
    return Report(
        path=out,
        num_bytes=len(html.encode()),
        num_rollouts=sum(r.num_rollouts for r in packed),
        num_rollouts_shown=sum(r.num_shown for r in packed),
    )


def unique(paths: Sequence[Path]) -> list[Path]:
    """Each folder once, in the order given."""
    return list({path.resolve(): path for path in paths}.values())


def _overview(run: RunFiles) -> dict[str, Any]:
    """One run's numbers, in columns: what the page shows before a block is loaded."""
    rollout, engine = run.config.get("rollout", {}), run.config.get("engine", {})
    trained = lengths.quantiles(lengths_by_step(run.path))
    every = -(-len(run.steps) // MAX_STEPS) or 1
    return {
        "name": run.name,
        "path": str(run.path),
        "steps": to_columns(run.steps[::-every][::-1]),  # always includes the last one
        "every": every,
        "evals": to_columns(run.evals),
        "replay": run.replay,
        "summary": {k: v for k, v in (run.summary or {}).items() if k != "evaluations"} if run.summary else None,
        "planned_steps": run.config.get("steps"),
        "slots": rollout.get("max_in_flight") or engine.get("max_slots"),
        "max_response_tokens": rollout.get("max_response_tokens"),
        "borders": thresholds.borders(run.config),
        "warnings": run.warnings,
        "lengths": {"admitted": trained, **lengths.of_timeline(run.timeline)},
        "config": flatten(run.config),
    }


def _compare(runs: Sequence[RunFiles], overview: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    configs = [run.config for run in runs]
    experiments = group_seeds(configs)
    names = {name for data in overview for part in ("steps", "evals") for name in data[part]}
    return {
        "version": __version__,
        "runs": overview,
        "experiments": name_experiments([run.name for run in runs], experiments),
        "experiment_of": experiments,
        "differences": differences(configs) if len(runs) > 1 else {},
        "metrics": _describe_metrics(names),
        "logprob_levels": tokens.logprob_levels(),
        "difference_levels": tokens.difference_levels(),
        "logprob_first": tokens.FIRST,
    }


def to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Name -> one value per row, None if the row has none. Only finite numbers; six digits suffice for a curve."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: Any) -> float | int | None:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, int) else None


def _describe_metrics(names: set[str]) -> dict[str, dict[str, str]]:
    """The registry's entry for each name that occurs; unknown names have none."""
    described = {}
    for name in sorted(names):
        metric = metric_names.find(name)
        if metric is not None:
            described[name] = {"unit": metric.unit, "meaning": metric.meaning, "healthy": metric.healthy}
    return described


def _describe_rollouts(rollouts: Rollouts, blocks: Blocks) -> dict[str, Any]:
    return {
        "total": rollouts.num_rollouts,
        "shown": rollouts.num_shown,
        "tokens_shown": rollouts.tokens_shown,
        "differences_shown": rollouts.differences_shown,
        "index": blocks.add({"columns": rollouts.index, "groups": rollouts.groups}),
    }


def _write(out: Path, html: str) -> None:
    """Complete or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        do = f"{error.strerror}; choose another with -o"
        raise RunError(explain("report", str(out), "a writable file", do)) from error
