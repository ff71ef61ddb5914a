"""The performance of a benchmarked strategy, step by step, and the figures of a window of steps.

The *consumed tokens* of a window are the tokens trained in it, minus those that were carried into it, plus those
carried out of it: what the window generated and did not discard. The rate is per second of generation, including abort
and replay. Pure functions; ``simulation.strategies`` and ``bench.published`` fill it in, ``bench.rollout`` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlpost.engine.protocol import Iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class StepAccount:
    """One step. Tokens unless named otherwise."""

    trained: int
    carried: int  # of ``trained``, sampled in an earlier step
    held: int  # untrained at the end of the step, to be trained later
    generated: int
    discarded: int  # generated, but never to be trained
    replayed: int  # prompts and tokens so far of resumed samples, fed to the engine again
    prefilled: int  # prompt and replayed tokens computed
    duration_s: float  # of generation, including the abort
    busy_slot_s: float
    offered_slot_s: float
    spans: tuple[int, ...] = ()  # policy versions in each trained sample
    staleness: int = 0  # of the oldest trained token, in policy versions
    work: Iterations = field(default_factory=Iterations)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Figures of a window of steps; shares are fractions of 1."""

    consumed_tokens_per_s: float
    generated_tokens_per_s: float
    idle_share: float
    carried_share: float
    discarded_share: float  # of the tokens generated
    replayed_tokens: int
    replay_share: float  # replayed over generated tokens
    span_mean: float
    span_max: int
    staleness_max: int
    duration_s: float
    steps: int
    tokens_per_iteration: float = 0.0  # generated, over the engine's iterations: a rate that no clock decides


def measure(steps: Sequence[StepAccount], *, warm_up: int) -> Figures:
    """Figures of all steps after the first ``warm_up`` ones.

    Raises AssertionError if tokens are unaccounted for: consumed must be generated minus discarded.
    """
    window = steps[warm_up:]
    carried_in = steps[warm_up - 1].held if warm_up else 0
    total = {name: sum(getattr(s, name) for s in window) for name in _SUMMED}
    consumed = total["trained"] - carried_in + window[-1].held
    kept = total["generated"] - total["discarded"]
    assert consumed == kept, f"{consumed} tokens consumed, but {kept} generated and kept"
    spans = [span for s in window for span in s.spans]
    return Figures(
        consumed_tokens_per_s=consumed / total["duration_s"],
        generated_tokens_per_s=total["generated"] / total["duration_s"],
        idle_share=1 - total["busy_slot_s"] / total["offered_slot_s"],
        carried_share=total["carried"] / max(1, total["trained"]),
        discarded_share=total["discarded"] / max(1, total["generated"]),
        replayed_tokens=total["replayed"],
        replay_share=total["replayed"] / max(1, total["generated"]),
        span_mean=sum(spans) / max(1, len(spans)),
        span_max=max(spans, default=0),
        staleness_max=max(s.staleness for s in window),
        duration_s=total["duration_s"],
        steps=len(window),
        tokens_per_iteration=total["generated"] / max(1, sum(len(s.work.step_s) for s in window)),
    )


_SUMMED = "trained carried generated discarded replayed duration_s busy_slot_s offered_slot_s".split()
