"""Statistics of one step's rollout. ``rollout.collect`` fills them; metrics, timeline and history read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rlpost.engine.protocol import EngineWork
from rlpost.rollout.open_groups import OpenGroup, OpenSample


class InFlight(NamedTuple):
    """A sample that is in the engine now."""

    group: OpenGroup
    sample: OpenSample
    start_s: float
    tokens_before: int
    kind: str
    replica: int


@dataclass(kw_only=True, slots=True)
class Spans:
    """Every stay of a sample in the engine, as parallel columns: the raw data of the run's timeline."""

    uid: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    replica: list[int] = field(default_factory=list)
    policy_version: list[int] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)  # when it was submitted, on the engine's clock
    end_s: list[float] = field(default_factory=list)  # its last delta, or the abort
    tokens: list[int] = field(default_factory=list)  # generated in this stay
    kind: list[str] = field(default_factory=list)  # launched, resumed after an interrupted stay, or kept
    end: list[str] = field(default_factory=list)  # stop, length, paused by an abort, or lost with its replica

    def add(self, flight: InFlight, policy_version: int, end_s: float, end: str) -> None:
        group, sample, start_s, tokens_before, kind, replica = flight
        self.uid.append(group.prompt.uid)
        self.index.append(sample.index)
        self.replica.append(replica)
        self.policy_version.append(policy_version)
        self.start_s.append(start_s)
        self.end_s.append(end_s)
        self.tokens.append(sample.num_tokens - tokens_before)
        self.kind.append(kind)
        self.end.append(end)


@dataclass(kw_only=True, slots=True)
class RolloutStats:
    """One step's statistics. Times in seconds on the engine's clock, counts in tokens unless named otherwise."""

    step: int
    slots: int
    stopped: bool = False  # interrupted on request: admitted groups wait until the step is retried
    started_s: float = 0.0
    ended_s: float = 0.0
    num_generated: int = 0
    num_replayed: int = 0  # tokens of carried-over samples fed to the engine again, including their prompts
    num_prefill: int = 0  # prompt and replayed tokens actually computed (without prefix-cache hits)
    num_launched: int = 0  # samples started for the first time
    num_resumed: int = 0
    num_kept: int = 0  # samples that resumed with their KV cache
    num_failed_rewards: int = 0
    num_scored: int = 0
    num_finished: int = 0  # samples whose last turn ended
    num_observed: int = 0  # tokens given to samples between two turns
    rejected: dict[str, int] = field(default_factory=dict)  # groups, by reason
    failures: dict[str, int] = field(default_factory=dict)  # samples, by kind
    last_failure: str | None = None
    work: EngineWork = field(default_factory=EngineWork)
    abort_s: float = 0.0  # of the requests left in flight, if ``work`` does not include it
    launched_lengths: list[int] = field(default_factory=list)  # tokens so far of the samples launched in this step
    dropped_lengths: dict[int, list[int]] = field(default_factory=dict)  # draw number -> lengths, of dropped groups
    deferred_lengths: list[int] = field(default_factory=list)  # tokens so far of the samples carried over
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (uid, how it ended), of the same dropped groups
    spans: Spans = field(default_factory=Spans)

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def idle_share(self) -> float:
        """1 - (sum of iteration time x running samples) / slot seconds offered; 0 if nothing ran."""
        offered = self.offered_slot_s
        return max(0.0, 1.0 - self.work.slot_seconds() / offered) if offered else 0.0

    @property
    def offered_slot_s(self) -> float:
        return self.work.wall_s * self.slots
