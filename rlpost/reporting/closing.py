"""The short table at the end of a finished run, in words a newcomer understands. Pure functions: facts in, text out.

Measures nothing. ``run`` fills :class:`ClosingFacts` and prints the table; what was not measured is None and its row is
omitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.durable.history import History
from rlpost.evaluation.intervals import Interval
from rlpost.reporting.progress import duration, percent
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.simulation.replay import Comparison

MAX_SIMULATOR_ERROR = 0.10  # above it, the simulated row would reflect the simulator's error more than APRIL


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosingFacts:
    run_dir: Path
    steps: int
    duration_s: float
    num_problems: int = 0  # of an evaluation
    samples_per_problem: int = 1
    accuracy_before: Interval | None = None
    accuracy_after: Interval | None = None
    accuracy_gain: Interval | None = None  # paired over the same problems
    response_tokens_before: float | None = None
    response_tokens_after: float | None = None
    rollout_tokens_per_s: float | None = None  # trained tokens over generation time
    idle_share: float | None = None
    carried_share: float | None = None
    rollout_s: float | None = None  # measured generation time of the run
    simulated_april_s: float | None = None  # the same rollouts in the simulator, as scheduled
    simulated_sync_s: float | None = None  # the same, with every step waiting for its slowest response
    model_dir: Path | None = None

    @property
    def simulator_error(self) -> float | None:
        """The simulator's error on the rollouts that did happen, as a share of their measured time."""
        if not self.rollout_s or self.simulated_april_s is None:
            return None
        return abs(self.simulated_april_s - self.rollout_s) / self.rollout_s


def gather_facts(
    history: History, *, path: Path, step: int, cfg: Config, comparison: Comparison | None
) -> ClosingFacts:
    """The facts in the run's history. ``comparison``: its rollouts simulated without APRIL, if that was done."""
    totals, rollout_s = history.totals, history.record.generate_s
    first, last = (history.evaluations[0], history.evaluations[-1]) if len(history.evaluations) > 1 else ({}, {})
    return ClosingFacts(
        run_dir=path,
        steps=step,
        duration_s=history.elapsed_s,
        num_problems=len(last.get("problems", [])),
        samples_per_problem=cfg.eval.samples_per_prompt,
        accuracy_before=_interval(first),
        accuracy_after=_interval(last),
        accuracy_gain=history.accuracy_gain(),
        response_tokens_before=first.get("eval/response_tokens"),
        response_tokens_after=last.get("eval/response_tokens"),
        rollout_tokens_per_s=totals["tokens"] / rollout_s if rollout_s else None,
        idle_share=totals["idle_s"] / totals["slot_s"] if totals["slot_s"] else None,
        carried_share=totals["carried_tokens"] / max(1, totals["tokens"]),
        rollout_s=rollout_s,
        simulated_april_s=comparison.simulated_s if comparison else None,
        simulated_sync_s=comparison.synchronous_s if comparison else None,
        model_dir=path / "model",
    )


def make_summary(facts: ClosingFacts, history: History, buffer: RolloutBuffer) -> dict[str, Any]:
    """The contents of ``finished.json``, which ``rlpost train`` returns."""
    evaluations = [{k: v for k, v in e.items() if k not in ("correct", "problems")} for e in history.evaluations]
    return {
        "steps": facts.steps,
        "duration_s": facts.duration_s,
        "evaluations": evaluations,
        "accuracy_gain": asdict(facts.accuracy_gain) if facts.accuracy_gain else None,
        "idle_share": facts.idle_share,
        "carried_share": facts.carried_share,
        "groups": dict(buffer.accounts.groups_ended),
        "tokens": dict(buffer.accounts.tokens_ended),
    }


def closing_table(facts: ClosingFacts) -> str:
    """Lines of ``label  value``, aligned; no colors, so it reads the same in a terminal, a log and an issue."""
    rows = [
        *_accuracy_rows(facts),
        *_length_rows(facts),
        *_rollout_rows(facts),
        *_place_rows(facts),
    ]
    width = max(len(label) for label, _ in rows)
    title = f"Done: {facts.steps} steps in {duration(facts.duration_s)}"
    return "\n".join([title, "-" * len(title), *(f"{label:<{width}}  {value}".rstrip() for label, value in rows)])


Row = tuple[str, str]


def _accuracy_rows(facts: ClosingFacts) -> list[Row]:
    rows: list[Row] = []
    before, after, gain = facts.accuracy_before, facts.accuracy_after, facts.accuracy_gain
    if before is not None:
        rows.append(("Accuracy before", _with_interval(before)))
    if after is not None:
        rows.append(("Accuracy after", _with_interval(after)))
    if gain is not None:
        ends = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
        rows.append(("  difference", f"{100 * gain.mean:+.1f} points ({ends}, on the same problems)"))
    if rows and facts.num_problems:
        times = f", {facts.samples_per_problem} responses each" if facts.samples_per_problem > 1 else ""
        problems = f"{facts.num_problems} problems not trained on{times}"
        rows.append(("  measured on", f"{problems}; in parentheses: 95 % interval"))
    return rows


def _length_rows(facts: ClosingFacts) -> list[Row]:
    before, after = facts.response_tokens_before, facts.response_tokens_after
    if before is None or after is None:
        return []
    return [("Response length", f"{before:.0f} tokens before, {after:.0f} after")]


def _rollout_rows(facts: ClosingFacts) -> list[Row]:
    rows: list[Row] = []
    if facts.rollout_tokens_per_s is not None:
        rows.append(("Generation speed", f"{facts.rollout_tokens_per_s:,.0f} tokens/s that were trained on"))
    if facts.idle_share is not None:
        rows.append(("Idle share", f"{percent(facts.idle_share)} of the engine's slots were empty while it ran"))
    if facts.carried_share is not None:
        rows.append(("Carried over", f"{percent(facts.carried_share)} of trained tokens came from earlier steps"))
    return rows + _simulated_rows(facts)


def _simulated_rows(facts: ClosingFacts) -> list[Row]:
    error = facts.simulator_error
    if error is None or error > MAX_SIMULATOR_ERROR or facts.simulated_sync_s is None or facts.rollout_s is None:
        return []
    simulated = f"(simulated; the simulator's error here: {percent(error)})"
    return [
        ("Generation took", duration(facts.rollout_s)),
        ("  without APRIL", f"{duration(facts.simulated_sync_s)} {simulated}"),
    ]


def _place_rows(facts: ClosingFacts) -> list[Row]:
    look = f"{facts.run_dir}/metrics.jsonl (numbers), {facts.run_dir}/rollouts (every response trained on)"
    rows = [("Everything is in", str(facts.run_dir)), ("Where to look", look)]
    rows.append(("As a page", f"rlpost report {facts.run_dir}"))
    if facts.model_dir is not None:
        rows.append(("The model", str(facts.model_dir)))
    rows.append(("", "docs/metrics.md explains each number"))
    return rows


def _with_interval(value: Interval) -> str:
    return f"{percent(value.mean)} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _interval(evaluation: Mapping[str, Any]) -> Interval | None:
    if not evaluation:
        return None
    mean, low, high = (evaluation[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    return Interval(mean=mean, low=low, high=high)
