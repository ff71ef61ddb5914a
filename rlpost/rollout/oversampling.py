"""How many groups to keep open: a ratio that follows the run's response lengths, filter and staleness budget.

A group's samples start together, and their slots become free one by one until the longest is done. So during its
lifetime of ``longest`` tokens, a group of G samples keeps ``G x mean / longest`` slots busy, and C slots are kept busy
by

    busy = C x longest / (G x mean)

groups in progress. N more may be admitted in the step, so the limit on open and admitted groups is

    limit = N + busy + waiting,    at most (S + 1) N                                                            (1)

where *waiting* are groups that are complete, or will be in the step, and may not train in it (``rollout.admission``:
first_begun), and the upper bound is the staleness budget (rule 1 of ``rollout.staleness`` always holds). A rejected
group makes room for exactly one, so the acceptance rate a does not enter the limit; it shortens how long a group is in
progress, in steps: ``lag = a x busy / N``. If the lag is above S, groups would exceed the budget: waiting then keeps
the bound, and slots stay empty whatever the limit is. Prompts are drawn only when a slot is free and no sample waits,
so a limit that is too high costs nothing except younger unfinished work at the end of a step.

``mean`` and ``longest`` are averages over groups in which older steps decay by ``DECAY``. No clock is read, so a
repeated run makes the same decisions. ``rollout.schedule`` is the caller; the state is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.rollout.strategy import RolloutStrategy

DECAY = 0.8  # of an average, per step: lengths drift with the policy over tens of steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A step's limit, and the reason for it."""

    max_open: int  # groups open or admitted
    reason: str


class OversampleController:
    """Averages of what was seen so far, and the limit they give.

    Args:
        strategy: N, G and S; its ``oversample`` is the ratio until something has been seen.
        slots: C, samples decoded at once.
    """

    def __init__(self, strategy: RolloutStrategy, *, slots: int) -> None:
        self.strategy, self.slots = strategy, slots
        self._weight = self._mean = self._longest = self._accepted = 0.0  # decayed sums over groups
        self._dropped: list[list[int]] = []  # in the current step

    def note_dropped(self, lengths: Sequence[int]) -> None:
        """A complete group was rejected or failed; its response lengths, in tokens."""
        self._dropped.append(list(lengths))

    def step_done(self, trained: Sequence[Sequence[int]]) -> None:
        """The step is over: the response lengths of each admitted group, in tokens."""
        groups = [lengths for lengths in (*trained, *self._dropped) if sum(lengths)]
        self._weight = DECAY * self._weight + len(groups)
        self._mean = DECAY * self._mean + sum(sum(lengths) / len(lengths) for lengths in groups)
        self._longest = DECAY * self._longest + sum(max(lengths) for lengths in groups)
        self._accepted = DECAY * self._accepted + sum(1 for lengths in trained if sum(lengths))
        self._dropped = []

    def choose(self, *, waiting: int = 0) -> Choice:
        """The limit for the step that begins. ``waiting``: groups expected to be complete without training in it; they
        hold no slot."""
        strategy = self.strategy
        n, budget = strategy.groups_per_step, (strategy.max_staleness + 1) * strategy.groups_per_step
        if not self._weight:
            return Choice(
                max_open=strategy.max_open, reason=f"nothing seen yet, so rollout.oversample={strategy.oversample}"
            )
        mean, longest = self._mean / self._weight, self._longest / self._weight
        accepted = self._accepted / self._weight
        busy = self.slots * longest / (strategy.samples_per_group * mean)
        limit = min(budget, n + math.ceil(busy) + waiting)
        reason = (
            f"{mean:.0f} tokens on average and {longest:.0f} in a group's longest keep {self.slots} slots busy with "
            f"{busy:.0f} groups in progress; {accepted:.0%} accepted, so a group takes {accepted * busy / n:.1f} steps"
        )
        if waiting:
            reason += f"; {waiting} complete ones may wait for older ones"
        if limit == budget:
            reason += f"; capped at the {budget} that max_staleness={strategy.max_staleness} allows"
        return Choice(max_open=limit, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _STATE:
            setattr(self, f"_{name}", state[name])


_STATE = ("weight", "mean", "longest", "accepted", "dropped")
