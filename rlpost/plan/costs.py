"""The cost of a step: a simulated engine's iterations, an update's tokens, and the rest; fitted to recorded steps.

``Costs`` prices a simulated step. Iterations are fitted by least squares (``simulation.replay``); update, publication
and the rest by medians over steps, so that one slow step does not count as typical. Pure functions.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.plan.recording import RecordedStep
from rlpost.simulation.engine import StepCost

# If the recorded steps' tokens differ by less, the update's fixed part cannot be separated from the cost per token.
MIN_SPREAD = 0.25  # (most - fewest) / median


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """In seconds, except ``prompt_tokens``; ``plan.request.COST_KEYS`` explains each one."""

    iteration_s: float
    sample_s: float
    prefill_s: float
    rollout_s: float
    update_s: float
    update_token_s: float
    reduce_s: float
    publish_s: float
    other_s: float
    prompt_tokens: float

    def engine(self) -> StepCost:
        return StepCost(base_s=self.iteration_s, sample_s=self.sample_s, prefill_s=self.prefill_s)

    def update(self, tokens: float, *, ranks: int) -> float:
        """Seconds of an update on ``tokens`` (including prompts), divided evenly; ``reduce_s`` is added to what the
        fixed part already contains."""
        return self.update_s + self.update_token_s * tokens / ranks + self.reduce_s


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateFit:
    update_s: float
    update_token_s: float
    is_proportional: bool  # the fixed part was taken as 0


def fit_update(steps: Sequence[RecordedStep], *, ranks: int) -> UpdateFit:
    """Theil-Sen line of update time over tokens per rank, with neither part negative.

    The slope is the median of the slopes between all pairs of steps, the fixed part is the median of the rest.
    """
    points = [(s.tokens / ranks, s.update_s) for s in steps]
    tokens = [x for x, _ in points]
    rate = statistics.median(y / max(1.0, x) for x, y in points)
    if max(tokens) - min(tokens) <= MIN_SPREAD * statistics.median(tokens):
        return UpdateFit(update_s=0.0, update_token_s=rate, is_proportional=True)
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x1 != x2]
    slope = max(0.0, statistics.median(slopes))
    fixed = statistics.median(y - slope * x for x, y in points)
    if fixed < 0:
        return UpdateFit(update_s=0.0, update_token_s=rate, is_proportional=True)
    return UpdateFit(update_s=fixed, update_token_s=slope, is_proportional=False)


def fit_costs(
    steps: Sequence[RecordedStep],
    engine: StepCost,
    *,
    rollout_s: float,
    prompt_tokens: float,
    ranks: int,
) -> Costs:
    """``engine``: already fitted; ``rollout_s``: by how much the simulated rollouts fell short of the recorded ones."""
    update = fit_update(steps, ranks=ranks)
    return Costs(
        iteration_s=engine.base_s,
        sample_s=engine.sample_s,
        prefill_s=engine.prefill_s,
        rollout_s=rollout_s,
        update_s=update.update_s,
        update_token_s=update.update_token_s,
        reduce_s=0.0,
        publish_s=statistics.median(s.publish_s for s in steps),
        other_s=statistics.median(s.other_s for s in steps),
        prompt_tokens=prompt_tokens,
    )
