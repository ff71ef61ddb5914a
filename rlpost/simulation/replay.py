"""What would the same rollouts have cost under another strategy? A cost model fitted to the run, and a simulator.

Owns the least-squares fit of the cost of one iteration to a run's record, and the replay of ``collect`` on the
simulated engine. The replay of the run's own strategy is compared with the measurement, which gives the simulator's
error. Called by ``run`` at the end of a run. Never runs a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from rlpost.config import Config
from rlpost.durable.run_record import RunRecord
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Group, Prompt


def fit_cost(record: RunRecord) -> StepCost:
    """Least squares without negative coefficients: a negative one is set to 0 and the others are fitted again."""
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


def compare_run(
    record: RunRecord, cfg: Config, settings: CollectSettings, buffer: RolloutBuffer, prompt_tokens: int
) -> Comparison | None:
    """The run's rollouts without APRIL, simulated; None for a run that was synchronous or generated nothing."""
    if buffer.strategy.is_synchronous or not record.generate_s:
        return None
    open_lengths = {g.order: [s.num_tokens for s in g.samples] for g in buffer.groups.values()}
    # the replay does not restart stale groups: lengths are given, so no group becomes too old because it is long
    strategy = replace(buffer.strategy, restart_stale=False)
    return compare_with_synchronous(
        record, open_lengths, settings, strategy, slots=cfg.max_in_flight, prompt_tokens=prompt_tokens
    )


def compare_with_synchronous(
    record: RunRecord,
    open_lengths: Mapping[int, list[int]],
    settings: CollectSettings,
    strategy: RolloutStrategy,
    *,
    slots: int,
    prompt_tokens: int,
) -> Comparison:
    """Replay the run with its own strategy and with synchronous rollouts: same prompts, lengths, slots and costs.

    ``open_lengths``: tokens so far of groups never finished, by draw number; they count as final lengths, which can
    only understate the synchronous time. ``slots``: the number an adaptive strategy assumes.
    """
    lengths = {**open_lengths, **record.lengths}
    cost = fit_cost(record)

    def simulate(strategy: RolloutStrategy) -> float:
        engine = SimulatedEngine(
            max_slots=settings.max_in_flight,
            length_of=lambda request_id: _length_of(request_id, lengths),
            max_response_tokens=settings.max_response_tokens,
            cost=cost,
        )
        return _simulated_seconds(engine, RolloutBuffer(strategy, slots=slots), record, settings, prompt_tokens)

    simulated_s = simulate(strategy)
    return Comparison(
        measured_s=record.generate_s,
        simulated_s=simulated_s,
        synchronous_s=simulate(replace(strategy, oversample=1.0, max_staleness=0, adaptive=False)),
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
        collect(
            engine, buffer, _numbered_prompts(prompt_tokens, buffer.accounts.num_drawn), scorer, settings, step=step
        )
        buffer.settle()
    return engine.now()


def _numbered_prompts(num_tokens: int, start: int) -> Iterator[Prompt]:
    token_ids = np.zeros(num_tokens, np.int32)
    return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count(start))


def _length_of(request_id: str, lengths: Mapping[int, list[int]]) -> int:
    """A draw that the run never made (a simulation may draw a few more) uses the lengths of an earlier one."""
    order, _, index = request_id.partition("/")
    known = lengths.get(int(order)) or lengths[int(order) % max(1, len(lengths))]
    return known[int(index)]
