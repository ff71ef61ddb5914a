"""What a run remembers about itself from first step to last, across resumes: totals, evaluations, lengths and costs.

Owns the counters behind the closing table and ``finished.json``, and saves them as JSON values. ``run`` updates it
once per step and per evaluation; nothing here looks at an engine or a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlpost.durable.run_record import RunRecord
from rlpost.evaluation.evaluate import EvalResult
from rlpost.evaluation.intervals import Interval, paired_difference
from rlpost.rollout.stats import RolloutStats


class History:
    """One run's history. ``elapsed_s`` excludes the time between a stop and a resume."""

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
        """The last step with an evaluation, -1 if there is none."""
        return self.evaluations[-1]["step"] if self.evaluations else -1

    def add_step(
        self, stats: RolloutStats, lengths: Mapping[int, list[int]], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """One step's statistics, with its groups' response lengths by draw number; returns the totals to be logged."""
        self.record.add(stats, lengths)
        self._count_slots(stats)
        consumed = metrics["rollout/consumed_tokens"]
        self.totals["samples"] += metrics["loss/sequences"]
        self.totals["tokens"] += consumed
        self.totals["carried_tokens"] += metrics["rollout/carried_share"] * consumed
        return {"total/samples": self.totals["samples"], "total/tokens": self.totals["tokens"]}

    def add_stopped(self, stats: RolloutStats) -> None:
        """The part of a step before a stop request: its time and its iterations, whose tokens train later."""
        self.record.add_time(stats)
        self._count_slots(stats)

    def add_evaluation(self, step: int, result: EvalResult) -> None:
        self.record.observe(result.work)
        problems = {"correct": result.correct.tolist(), "problems": list(result.problems)}
        self.evaluations.append({"step": step, **problems, **result.metrics()})

    def accuracy_gain(self) -> Interval | None:
        """Last versus first evaluation, if both scored the same problems."""
        if len(self.evaluations) < 2 or self.evaluations[0]["problems"] != self.evaluations[-1]["problems"]:
            return None
        return paired_difference(*(np.array(self.evaluations[i]["correct"]) for i in (0, -1)))

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
