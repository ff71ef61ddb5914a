"""What a run records about its rollouts: response lengths by draw, and the cost of engine iterations.

Owned by ``durable.history``; ``simulation.replay`` fits costs to it and ``plan`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpost.engine.protocol import Iterations
from rlpost.rollout.stats import RolloutStats


@dataclass(slots=True)
class RunRecord:
    """Lengths by draw number, and the normal equations of iteration time on (1, running, prefilled tokens)."""

    lengths: dict[int, list[int]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)  # draws ended by a filter or a failed reward
    generate_s: float = 0.0
    num_steps: int = 0
    moments: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, stats: RolloutStats, admitted: Mapping[int, list[int]]) -> None:
        """One step: its statistics, and the lengths of its admitted groups by draw number."""
        self.lengths.update(admitted)
        self.lengths.update(stats.dropped_lengths)
        self.dropped.update(stats.dropped_lengths)
        self.num_steps += 1
        self.add_time(stats)

    def add_time(self, stats: RolloutStats) -> None:
        """The duration of a rollout, or of part of one, and its iterations."""
        self.generate_s += stats.duration_s
        self.observe(stats.work)

    def observe(self, work: Iterations) -> None:
        """Iterations to fit costs to. APRIL keeps the slots full, so its own iterations cannot separate an iteration's
        fixed cost from the cost per sample; evaluations, which drain at their end, can."""
        if work.step_s:
            features = np.stack([np.ones(len(work.step_s)), work.running, work.prefill], axis=1)
            self.moments += features.T @ features
            self.targets += features.T @ np.asarray(work.step_s)

    def lengths_since(self, order: int) -> list[int]:
        """Response lengths of the ended groups that were drawn as number ``order`` or later."""
        return [n for drawn, lengths in self.lengths.items() if drawn >= order for n in lengths]

    def sums(self) -> dict[str, Any]:
        """The normal equations as JSON values; the inverse of :meth:`add_sums`."""
        return {"moments": self.moments.tolist(), "targets": self.targets.tolist()}

    def add_sums(self, sums: Mapping[str, Any]) -> None:
        self.moments += np.array(sums["moments"])
        self.targets += np.array(sums["targets"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "lengths": {str(k): v for k, v in self.lengths.items()},
            "dropped": sorted(self.dropped),
            "generate_s": self.generate_s,
            "num_steps": self.num_steps,
            **self.sums(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lengths = {int(k): v for k, v in state["lengths"].items()}
        self.dropped = set(state["dropped"])
        self.generate_s, self.num_steps = state["generate_s"], state["num_steps"]
        self.moments, self.targets = np.array(state["moments"]), np.array(state["targets"])


def iteration_sums(work: Iterations) -> dict[str, Any]:
    """What ``simulation.replay.fit_cost`` needs from iterations, as JSON values."""
    record = RunRecord()
    record.observe(work)
    return record.sums()
