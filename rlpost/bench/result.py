"""What the rollout benchmark measured: ``bench.rollout`` fills it in, ``bench.plot`` draws it."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.simulation.account import Figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One strategy on one engine with one distribution; a figure per repeat. Ratios are within a repeat."""

    engine: str
    lengths: str
    strategy: str
    figures: list[Figures]
    of_saturated: list[float]
    replay_time_share: list[float]  # replayed prefill's seconds over all others, by a prefilled token's fitted cost
