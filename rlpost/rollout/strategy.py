"""A rollout strategy in numbers: what may be open, how old it may get, which complete groups a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.config import RolloutConfig

FIRST_COMPLETE, FIRST_STARTED = "first_complete", "first_begun"
BY_DEADLINE, ROUND_ROBIN = "by_deadline", "round_robin"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStrategy:
    """Synchronous rollouts are ``oversample`` 1.0 and ``max_staleness`` 0. See ``RolloutConfig`` for each."""

    groups_per_step: int  # N
    samples_per_group: int  # G
    oversample: float = 1.0  # groups that may be open or admitted in a step, over N
    max_staleness: int = 0  # S, in policy versions
    adaptive: bool = False  # the ratio is chosen again in each step; ``oversample`` is its initial value
    restart_stale: bool = False  # draw and admit regardless of age, and restart a group that has become too old
    admission: str = FIRST_COMPLETE  # which complete groups a step may take; see ``rollout.admission``
    order: str = BY_DEADLINE  # of starting samples; round_robin: the first of each group, then the second, ...

    @classmethod
    def of(cls, rollout: RolloutConfig) -> RolloutStrategy:
        return cls(
            groups_per_step=rollout.groups_per_step,
            samples_per_group=rollout.samples_per_group,
            oversample=rollout.oversample,
            max_staleness=rollout.max_staleness,
            adaptive=rollout.adaptive_oversample,
            restart_stale=rollout.on_stale == "restart",
            admission=rollout.admission,
        )

    @property
    def max_open(self) -> int:
        return int(self.oversample * self.groups_per_step)

    @property
    def is_synchronous(self) -> bool:
        return self.oversample <= 1.0 and not self.adaptive

    @property
    def samples_per_step(self) -> int:
        return self.groups_per_step * self.samples_per_group
