"""What a run remembers of itself from first step to last, across resumes: totals, evaluations, lengths and costs.

Owns the counters behind the closing table and ``finished.json``, and saves them as JSON values. ``loop`` feeds it
once a step and once an evaluation; nothing here looks at an engine or a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config import Config
from rlpost.estimates import Interval, paired_difference
from rlpost.evaluate import EvalResult
from rlpost.reporting.closing import ClosingFacts
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, RolloutStats
from rlpost.rollout.oversampling import make_controller
from rlpost.rollout.replay import Comparison, RunRecord, compare_with_synchronous


class History:
    """One run's memory. ``elapsed_s`` leaves out the time between a stop and a resume."""

    def __init__(self) -> None:
        self.record = RunRecord()
        self.totals = {"samples": 0.0, "tokens": 0.0, "carried_tokens": 0.0, "idle_s": 0.0, "slot_s": 0.0}
        self.evaluations: list[dict[str, Any]] = []
        self._elapsed_before_s = 0.0
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_before_s + time.monotonic() - self._started_s

    @property
    def evaluated_step(self) -> int:
        """The last step with an evaluation, -1 where there is none."""
        return self.evaluations[-1]["step"] if self.evaluations else -1

    def add_step(
        self, stats: RolloutStats, lengths: Mapping[int, list[int]], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """One step's account, with its groups' response lengths by draw number; returns the totals to be logged."""
        self.record.add(stats, lengths)
        self._count_slots(stats)
        consumed = metrics["rollout/consumed_tokens"]
        self.totals["samples"] += metrics["loss/sequences"]
        self.totals["tokens"] += consumed
        self.totals["carried_tokens"] += metrics["rollout/carried_share"] * consumed
        return {"total/samples": self.totals["samples"], "total/tokens": self.totals["tokens"]}

    def add_stopped(self, stats: RolloutStats) -> None:
        """The half of a step that a stop request ended: its time and its iterations, whose tokens train later."""
        self.record.add_time(stats)
        self._count_slots(stats)

    def add_evaluation(self, step: int, result: EvalResult) -> None:
        self.record.observe(result.work)
        problems = {"correct": result.correct.tolist(), "problems": list(result.problems)}
        self.evaluations.append({"step": step, **problems, **result.metrics()})

    def compare(
        self, cfg: Config, settings: CollectSettings, buffer: RolloutBuffer, prompt_tokens: int
    ) -> Comparison | None:
        """The same rollouts without APRIL, simulated; None for a run that was synchronous or generated nothing."""
        rollout = cfg.rollout
        is_synchronous = rollout.oversample <= 1.0 and not rollout.adaptive_oversample
        if is_synchronous or not self.record.generate_s:
            return None
        return compare_with_synchronous(
            self.record,
            {g.order: [s.num_tokens for s in g.samples] for g in buffer.groups.values()},
            settings,
            groups_per_step=rollout.groups_per_step,
            samples_per_group=rollout.samples_per_group,
            oversample=rollout.oversample,
            max_staleness=rollout.max_staleness,
            admission=rollout.admission,
            controller=make_controller(cfg),
            prompt_tokens=prompt_tokens,
        )

    def closing_facts(self, path: Path, step: int, cfg: Config, comparison: Comparison | None) -> ClosingFacts:
        totals, rollout_s = self.totals, self.record.generate_s
        first, last = (self.evaluations[0], self.evaluations[-1]) if len(self.evaluations) > 1 else ({}, {})
        return ClosingFacts(
            run_dir=path,
            steps=step,
            duration_s=self.elapsed_s,
            num_problems=len(last.get("problems", [])),
            samples_per_problem=cfg.eval.samples_per_prompt,
            accuracy_before=_interval(first),
            accuracy_after=_interval(last),
            accuracy_gain=self._gain(),
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

    def summary(self, facts: ClosingFacts, buffer: RolloutBuffer) -> dict[str, Any]:
        """What ``finished.json`` holds and ``rlpost train`` returns."""
        return {
            "steps": facts.steps,
            "duration_s": facts.duration_s,
            "evaluations": [{k: v for k, v in e.items() if k not in ("correct", "problems")} for e in self.evaluations],
            "accuracy_gain": asdict(facts.accuracy_gain) if facts.accuracy_gain else None,
            "idle_share": facts.idle_share,
            "carried_share": facts.carried_share,
            "groups": dict(buffer.groups_ended),
            "tokens": dict(buffer.tokens_ended),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "record": self.record.state_dict(),
            "totals": self.totals,
            "evaluations": self.evaluations,
            "elapsed_s": self.elapsed_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.record.load_state_dict(state["record"])
        self.totals, self.evaluations = dict(state["totals"]), list(state["evaluations"])
        self._elapsed_before_s, self._started_s = float(state["elapsed_s"]), time.monotonic()

    def _count_slots(self, stats: RolloutStats) -> None:
        self.totals["idle_s"] += stats.idle_share * stats.offered_slot_s
        self.totals["slot_s"] += stats.offered_slot_s

    def _gain(self) -> Interval | None:
        """Last against first evaluation, where both judged the same problems."""
        if len(self.evaluations) < 2 or self.evaluations[0]["problems"] != self.evaluations[-1]["problems"]:
            return None
        return paired_difference(*(np.array(self.evaluations[i]["correct"]) for i in (0, -1)))


def _interval(evaluation: Mapping[str, Any]) -> Interval | None:
    if not evaluation:
        return None
    mean, low, high = (evaluation[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    return Interval(mean=mean, low=low, high=high)
