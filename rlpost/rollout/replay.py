"""What would the same rollouts have cost under another strategy? A cost model fitted to the run, and a simulator.

Owns the record of a run's response lengths and iteration times, the least-squares fit of the cost of one iteration,
and the replay of ``collect`` on the simulated engine. The replay of the run's own strategy is compared with what was
measured, which is the simulator's error. Called by ``loop`` at the end of a run. Never runs a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlpost.rollout.admission import FIRST_COMPLETE
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, RolloutStats, collect
from rlpost.rollout.engine import Iterations
from rlpost.rollout.oversampling import OversampleController
from rlpost.rollout.scoring import InlineScorer
from rlpost.rollout.simulated_engine import SimulatedEngine, StepCost
from rlpost.types import Group, Prompt


@dataclass(slots=True)
class RunRecord:
    """Lengths by draw number, and the normal equations of iteration time on (1, running, prefilled tokens)."""

    lengths: dict[int, list[int]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)  # draws that a filter or a failed reward ended
    generate_s: float = 0.0
    num_steps: int = 0
    moments: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, stats: RolloutStats, admitted: Mapping[int, list[int]]) -> None:
        """One step: its account, and the lengths of its admitted groups by draw number."""
        self.lengths.update(admitted)
        self.lengths.update(stats.dropped_lengths)
        self.dropped.update(stats.dropped_lengths)
        self.num_steps += 1
        self.add_time(stats)

    def add_time(self, stats: RolloutStats) -> None:
        """What a rollout, or the part of one, took and its iterations."""
        self.generate_s += stats.duration_s
        self.observe(stats.work)

    def observe(self, work: Iterations) -> None:
        """Iterations to fit costs to. APRIL keeps the slots full, so its own say nothing about how an iteration's
        fixed cost and a sample's cost divide; evaluations, which run dry at their end, do."""
        if work.step_s:
            features = np.stack([np.ones(len(work.step_s)), work.running, work.prefill], axis=1)
            self.moments += features.T @ features
            self.targets += features.T @ np.asarray(work.step_s)

    def lengths_since(self, order: int) -> list[int]:
        """Response lengths of the ended groups that were drawn as number ``order`` or later."""
        return [n for drawn, lengths in self.lengths.items() if drawn >= order for n in lengths]

    def sums(self) -> dict[str, Any]:
        """The normal equations as JSON values; :meth:`add_sums` takes them in again."""
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
    """What :func:`fit_cost` needs of some iterations, as JSON values."""
    record = RunRecord()
    record.observe(work)
    return record.sums()


def fit_cost(record: RunRecord) -> StepCost:
    """Least squares with no negative coefficient: a negative one is set to 0 and the others are fitted again."""
    active = [0, 1, 2]
    while active:
        solution = np.linalg.lstsq(record.moments[np.ix_(active, active)], record.targets[active], rcond=None)[0]
        if (solution >= 0).all():
            break
        active.remove(active[int(np.argmin(solution))])
    coefficients = np.zeros(3)
    coefficients[active] = solution if active else 0.0
    return StepCost(base_s=coefficients[0], sample_s=coefficients[1], prefill_s=coefficients[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Generation seconds of the whole run. ``error``: |simulated - measured| / measured of the run's own strategy."""

    measured_s: float
    simulated_s: float
    synchronous_s: float
    error: float


def compare_with_synchronous(
    record: RunRecord,
    open_lengths: Mapping[int, list[int]],
    settings: CollectSettings,
    *,
    groups_per_step: int,
    samples_per_group: int,
    oversample: float,
    max_staleness: int,
    prompt_tokens: int,
    admission: str = FIRST_COMPLETE,
    controller: OversampleController | None = None,
) -> Comparison:
    """Replay the run with its own strategy and with synchronous rollouts: same prompts, lengths, slots and costs.

    ``open_lengths``: tokens so far of groups never finished, by draw number; they count as final lengths, which can
    only understate the synchronous time. ``controller``: a new one where the run's ratio was adaptive.
    """
    lengths = {**open_lengths, **record.lengths}
    cost = fit_cost(record)

    def simulate(oversample: float, max_staleness: int, controller: OversampleController | None) -> float:
        buffer = RolloutBuffer(
            groups_per_step=groups_per_step,
            samples_per_group=samples_per_group,
            oversample=oversample,
            max_staleness=max_staleness,
            admission=admission,
            controller=controller,
        )
        engine = SimulatedEngine(
            max_slots=settings.max_in_flight,
            length_of=lambda request_id: _length_of(request_id, lengths),
            max_response_tokens=settings.max_response_tokens,
            cost=cost,
        )
        return _simulated_seconds(engine, buffer, record, settings, prompt_tokens)

    simulated_s = simulate(oversample, max_staleness, controller)
    return Comparison(
        measured_s=record.generate_s,
        simulated_s=simulated_s,
        synchronous_s=simulate(1.0, 0, None),
        error=abs(simulated_s - record.generate_s) / record.generate_s,
    )


def _simulated_seconds(
    engine: SimulatedEngine, buffer: RolloutBuffer, record: RunRecord, settings: CollectSettings, prompt_tokens: int
) -> float:
    def reject(group: Group) -> str | None:
        return "as recorded" if int(group.uid) in record.dropped else None

    settings = replace(settings, reject=reject, max_filtered_groups=1 << 30)
    scorer = InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")
    for step in range(record.num_steps):
        collect(engine, buffer, _numbered_prompts(prompt_tokens, buffer.num_drawn), scorer, settings, step=step)
        buffer.settle()
    return engine.now()


def _numbered_prompts(num_tokens: int, start: int) -> Iterator[Prompt]:
    token_ids = np.zeros(num_tokens, np.int32)
    return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count(start))


def _length_of(request_id: str, lengths: Mapping[int, list[int]]) -> int:
    """A draw that the run never made (a simulation may draw a few more) takes the lengths of an earlier one."""
    order, _, index = request_id.partition("/")
    known = lengths.get(int(order)) or lengths[int(order) % max(1, len(lengths))]
    return known[int(index)]
