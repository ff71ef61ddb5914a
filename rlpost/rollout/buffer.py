"""The rollout buffer: every group drawn and not yet trained, with its samples' tokens so far.

Owns the state of open groups: which samples wait or run, and what they have generated. ``rollout.schedule`` decides
what starts next and what may be admitted; ``rollout.accounts`` keeps the counts that show that nothing is lost. With a
ledger, every event here is also queued as a row, :meth:`RolloutBuffer.store` writes a rollout's rows and drops the
tokens from memory, and :meth:`load_tokens` reads them back for the few samples that resume. It never talks to an
engine, a scorer or the data: ``rollout.collect`` moves things in and out, ``run`` stores and settles. One owner, one
thread.

A group is *open* (samples wait, run or are paused), *scoring* (all samples finished, reward results pending), *ready*
(complete, not admitted) or *admitted*, and ends as trained, rejected[filter] or failed[reason].
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlpost.errors import RunError, explain
from rlpost.rollout.accounts import Accounts, LedgerError
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.open_groups import FINISHED, PAUSED, RUNNING, SCORED, WAITING, OpenGroup, OpenSample
from rlpost.rollout.schedule import Schedule
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.types import Group, Prompt


class RolloutBuffer:
    """See the module docstring. ``begin_step`` and ``settle`` bracket each step of the loop.

    Args:
        strategy: how many groups and samples, their maximum age and their order.
        ledger: where everything is recorded; None keeps tokens in memory (simulations, evaluations).
        slots: samples decoded at once, which an adaptive strategy keeps busy.
    """

    def __init__(self, strategy: RolloutStrategy, *, ledger: Ledger | None = None, slots: int = 1) -> None:
        self.strategy, self.ledger = strategy, ledger
        self.schedule = Schedule(strategy, slots=slots)
        self.accounts = Accounts()
        self.step = 0
        self.groups: dict[str, OpenGroup] = {}  # untrained and not admitted, by uid, in the order drawn
        self.admitted: list[OpenGroup] = []
        self._ledger_s = 0.0

    @property
    def is_full(self) -> bool:
        """Whether the step's rollout is complete."""
        return len(self.admitted) >= self.strategy.groups_per_step

    # ---- begin and end of a step ----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        assert not self.admitted, "settle() must be called before the next step begins"
        self.step = self.schedule.step = step
        for group in self.groups.values():
            if self.strategy.restart_stale and self.schedule.is_late(group) and not group.awaits_rewards:
                self._restart(group)
            group.count_samples()
        self.schedule.begin_step(step, self.groups.values())
        if self.ledger is not None:
            with self._timed():
                self.ledger.record("begins", None, step + 1)
                self.ledger.commit()

    def rollout(self) -> list[Group]:
        """The groups admitted in this step, with all their tokens."""
        self.load_tokens(self.admitted)
        return [g.freeze() for g in self.admitted]

    def store(self) -> None:
        """Write everything since the last call to the ledger; from then on it alone holds the waiting groups'
        tokens."""
        if self.ledger is None:
            return
        with self._timed():
            self.ledger.commit()
        for group in self.groups.values():
            group.frozen = None
            for sample in group.samples:
                if sample.segments:
                    sample.segments, sample.evicted = (), True

    def settle(self, failed: Mapping[str, str] | None = None) -> None:
        """The admitted groups leave the buffer: trained, or failed[reason] for the uids in ``failed``."""
        failed = failed or {}
        self.schedule.step_done(self.admitted)
        for group in self.admitted:
            self._end(group, f"failed[{failed[group.uid]}]" if group.uid in failed else "trained")
        self.admitted = []
        if self.ledger is not None:
            with self._timed():
                self.ledger.record("steps", self.step + 1, json.dumps(self.accounts.totals()))
                self.ledger.commit()

    def release_admitted(self) -> None:
        """For an interrupted step: admitted groups become ready again, for when the step is retried."""
        for group in self.admitted:
            group.state = "ready"
        self.schedule.returned(self.admitted)
        untrained = [*self.groups.values(), *self.admitted]
        self.groups = {g.uid: g for g in sorted(untrained, key=lambda g: g.order)}
        self.admitted = []

    # ---- drawing and scheduling -----------------------------------------------------------------------------

    def may_draw(self) -> bool:
        """Whether one more prompt may be drawn in this step."""
        return self.schedule.may_draw(len(self.groups), len(self.admitted))

    def add(self, prompt: Prompt) -> None:
        samples = [OpenSample(index=i) for i in range(self.strategy.samples_per_group)]
        group = OpenGroup(prompt=prompt, order=self.accounts.num_drawn, drawn_step=self.step, samples=samples)
        assert prompt.uid not in self.groups, f"prompt {prompt.uid} was drawn twice"
        self.groups[prompt.uid] = group
        self.accounts.num_drawn += 1
        if self.ledger is not None:
            self.ledger.record_draw(group.order, self.step + 1, prompt, len(samples))
        group.count_samples()
        self.schedule.added(group)

    def next_samples(self, limit: int) -> list[tuple[OpenGroup, OpenSample]]:
        """The samples to start next: at most ``limit``, all of one group; empty if none waits. From then on they count
        as running."""
        group = self.schedule.next_group(self.groups)
        if group is None:
            return []
        limit = min(limit, self.schedule.samples_at_once or limit)
        found = [(group, s) for s in group.samples if s.state == WAITING or s.state == PAUSED][:limit]
        group.num_startable -= len(found)
        for _, sample in found:
            sample.state, sample.mixed_kv = RUNNING, False
            if sample.first_step < 0:
                sample.first_step = self.step
                self._record("launches", group, sample)
        if self.schedule.samples_at_once is not None:
            self.schedule.offer(group)
        return found

    def resume(self, uid: str, index: int) -> tuple[OpenGroup, OpenSample]:
        """Mark a paused sample as running before anything is scheduled: the engine kept its KV cache."""
        group = self.groups[uid]
        sample = group.samples[index]
        assert sample.state == PAUSED and not self.strategy.restart_stale, (uid, index, sample.state)
        sample.state, sample.mixed_kv = RUNNING, True
        group.num_startable -= 1
        return group, sample

    def load_tokens(self, groups: Iterable[OpenGroup], samples: Iterable[OpenSample] | None = None) -> None:
        """Read back from the ledger the tokens of ``samples``, one per group, or of all samples of ``groups``."""
        pairs = zip(groups, samples, strict=True) if samples else ((g, s) for g in groups for s in g.samples)
        evicted = [(g, s) for g, s in pairs if s.evicted]
        if not evicted:
            return
        assert self.ledger is not None, "without a ledger nothing is evicted"
        with self._timed():
            stored = self.ledger.read_segments([(g.order, s.index, g.attempt) for g, s in evicted])
            for (_, sample), segments in zip(evicted, stored, strict=True):
                assert not sample.segments, "a sample resumes only after its tokens are back"
                sample.segments, sample.evicted = segments, False

    # ---- what the engine and the scorer report --------------------------------------------------------------

    def receive(self, group: OpenGroup, sample: OpenSample, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """New tokens of a running sample, in order, each exactly once."""
        assert sample.state == RUNNING and len(token_ids) == len(logprobs), (group.uid, sample.index, sample.state)
        if len(token_ids):
            sample.append(token_ids, logprobs)
            self._count(group, len(token_ids))

    def end_turn(self, group: OpenGroup, sample: OpenSample) -> None:
        """The model's turn is over; the caller continues with :meth:`observe` or :meth:`finish`."""
        self._seal(group, sample)

    def observe(self, group: OpenGroup, sample: OpenSample, token_ids: np.ndarray) -> None:
        """Append tokens that the policy did not sample; the sample then waits for another turn."""
        segment = sample.observe(token_ids, self.step)
        self._count(group, len(token_ids))
        if self.ledger is not None:
            self.ledger.record_segment(group.order, sample.index, group.attempt, self.step + 1, segment)
        self._wait(group, sample)
        self.schedule.offer(group)

    def finish(self, group: OpenGroup, sample: OpenSample, finish_reason: str) -> None:
        """The sample is over and awaits its reward."""
        sample.finish_reason, sample.state = finish_reason, FINISHED
        group.num_unfinished -= 1
        self._record("finishes", group, sample, finish_reason)
        if not group.num_unfinished:
            group.state = "scoring"
        elif group.num_startable:
            self.schedule.offer(group)

    def pause(self, group: OpenGroup, sample: OpenSample, *, startable: bool = True) -> None:
        """A running sample left the engine unfinished and keeps its tokens. ``startable``: it may be started again in
        this step, otherwise only in the next one."""
        self._seal(group, sample)
        self._wait(group, sample)
        if startable:
            self.schedule.offer(group)

    def score(
        self,
        group: OpenGroup,
        sample: OpenSample,
        reward: float | None,
        parts: Mapping[str, float],
        failure: str | None,
    ) -> bool:
        """A reward result arrived; True if it was the group's last one, which makes the group ready."""
        known = (group.uid, sample.index, reward, failure)
        assert sample.state == FINISHED and (reward is None) == (failure is not None), known
        sample.reward, sample.reward_parts, sample.failure, sample.state = reward, parts, failure, SCORED
        if self.ledger is not None:
            self._record("verdicts", group, sample, reward, json.dumps(dict(parts)), failure)
        group.num_unscored -= 1
        if group.num_unscored:
            return False
        group.state = "ready"
        self.schedule.became_ready(group)
        return True

    def unscored(self) -> list[tuple[OpenGroup, OpenSample]]:
        """Finished samples without a reward result: a new scorer needs them after a resume."""
        return [(g, s) for g in self.groups.values() for s in g.samples if s.state == FINISHED]

    # ---- admission ------------------------------------------------------------------------------------------

    def try_admit(self, group: OpenGroup) -> bool:
        """Admit a ready group to this step's batch if the staleness rule allows it."""
        if not self.schedule.may_admit(group, len(self.admitted)):
            return False
        self._leave(group)
        group.state = "admitted"
        self.admitted.append(group)
        return True

    def drop(self, group: OpenGroup, end: str) -> None:
        """A ready group that will not train: ``end`` is rejected[filter] or failed[reason]."""
        self._leave(group)
        self.schedule.dropped(group, self.groups)
        self._end(group, end)

    # ---- accounting -----------------------------------------------------------------------------------------

    def states(self) -> Counter[str]:
        """Number of untrained groups by phase: waiting, in_flight, paused, scoring, ready, admitted."""
        return Counter([g.phase() for g in self.groups.values()] + ["admitted"] * len(self.admitted))

    def check_conservation(self, *, under_way: bool = False) -> None:
        """Raises LedgerError with the numbers unless every group drawn and token received is in exactly one known
        state and no group due in this step is left. Holds after a step's last admission; ``under_way``: the step was
        stopped before that, and groups due in it may wait."""
        self.accounts.check([*self.groups.values(), *self.admitted], step=self.step)
        self.schedule.check(self.groups.values(), under_way=under_way)

    def check_ledger(self) -> None:
        """Check that the ledger holds the same groups and tokens as memory; call it between steps, after a store."""
        assert self.ledger is not None and not self.admitted
        here = len(self.groups), sum(g.num_tokens for g in self.groups.values())
        there = self.ledger.held()
        if here != there:
            raise LedgerError(f"step {self.step}: (groups, tokens) held are {here} in memory, {there} in the ledger")

    def lengths(self, first: int = 0) -> tuple[list[int], list[int]]:
        """Of the untrained groups drawn as number ``first`` or later: the lengths of finished responses, and the
        tokens so far of unfinished ones."""
        samples = [s for g in self.groups.values() if g.order >= first for s in g.samples]
        return [s.num_tokens for s in samples if s.finish_reason], [
            s.num_tokens for s in samples if not s.finish_reason
        ]

    def longest_unfinished(self) -> int:
        """Tokens so far of the longest unfinished response."""
        return max(self.lengths()[1], default=0)

    # ---- durable state --------------------------------------------------------------------------------------

    def state_dict(self, *, under_way: bool = False) -> dict[str, Any]:
        """What the ledger's rows do not contain, as JSON values. Call it between steps, or ``under_way`` after
        :meth:`release_admitted`."""
        assert not self.admitted and not any(s.state == RUNNING for g in self.groups.values() for s in g.samples)
        sizes = {name: getattr(self.strategy, name) for name in SIZES}
        state = {**sizes, "step": self.step, "under_way": under_way, "totals": self.accounts.totals()}
        if self.schedule.controller is not None:
            state["controller"] = self.schedule.controller.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], groups: Iterable[OpenGroup], *, rolled_back: int = 0) -> None:
        """Restore ``state`` with the ledger's open groups.

        rolled_back: tokens that rollbacks have discarded so far, in all attempts of the run.

        Raises RunError if the group size differs, or if fewer groups per step or a smaller staleness would leave
        waiting groups that can no longer be trained in time (unless stale groups are restarted).
        """
        _check_sizes(self.strategy, state)
        self.step = self.schedule.step = state["step"]
        self.accounts.load(state["totals"])
        self.accounts.roll_back(rolled_back)
        if self.schedule.controller is not None and "controller" in state:  # absent if the ratio was fixed before
            self.schedule.controller.load_state_dict(state["controller"])
        self.groups = {g.uid: g for g in groups}
        self.admitted = []
        self.schedule.load(self.groups.values())
        self.check_conservation(under_way=state["under_way"])

    def take_ledger_s(self) -> float:
        """Seconds spent in the ledger's transactions, including reads, since the last call."""
        seconds, self._ledger_s = self._ledger_s, 0.0
        return seconds

    # ---- private --------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._ledger_s += time.perf_counter() - started

    def _count(self, group: OpenGroup, num_tokens: int) -> None:
        self.accounts.tokens_received += num_tokens
        if group.oldest_version is None:
            self.schedule.set_oldest(group, self.step)

    def _wait(self, group: OpenGroup, sample: OpenSample) -> None:
        sample.state = PAUSED if sample.num_tokens else WAITING
        group.num_startable += 1

    def _leave(self, group: OpenGroup) -> None:
        del self.groups[group.uid]
        self.schedule.left(group)

    def _end(self, group: OpenGroup, end: str) -> None:
        unscored = self.accounts.end(group, end)
        if self.ledger is not None:
            self.ledger.record("ends", group.order, self.step + 1, end, group.num_tokens, unscored)

    def _restart(self, group: OpenGroup) -> None:
        """Too old to train on: discard the tokens and start the prompt over under the new policy."""
        discarded = group.num_tokens
        group.attempt += 1
        self.accounts.restart(discarded)
        if self.ledger is not None:
            self.ledger.record("restarts", group.order, group.attempt, self.step + 1, discarded)
        for sample in group.samples:
            sample.restart()
        group.state = "open"
        group.frozen = None
        self.schedule.restarted(group)

    def _seal(self, group: OpenGroup, sample: OpenSample) -> None:
        segment = sample.seal(self.step)
        if segment is not None and self.ledger is not None:
            self.ledger.record_segment(group.order, sample.index, group.attempt, self.step + 1, segment)

    def _record(self, table: str, group: OpenGroup, sample: OpenSample, *values: Any) -> None:
        if self.ledger is not None:
            self.ledger.record(table, group.order, sample.index, group.attempt, self.step + 1, *values)


SIZES = ("groups_per_step", "samples_per_group", "max_staleness")  # strategy values that a resume may not shrink


def _check_sizes(strategy: RolloutStrategy, state: Mapping[str, Any]) -> None:
    size = state["samples_per_group"]
    if strategy.samples_per_group != size:
        do = "restore the old value, or use another name"
        raise RunError(explain("resuming: rollout.samples_per_group", strategy.samples_per_group, str(size), do))
    for name in ("groups_per_step", "max_staleness"):
        if getattr(strategy, name) < state[name] and not strategy.restart_stale:
            do = "restore the old value, or use another name, or set rollout.on_stale=restart"
            raise RunError(explain(f"resuming: rollout.{name}", getattr(strategy, name), f">= {state[name]}", do))
