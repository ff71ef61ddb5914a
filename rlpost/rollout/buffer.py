"""The rollout buffer: every group drawn and not yet trained, and the counts that show that nothing is lost.

Owns the state of open groups (who waits, who runs, what was generated so far) and the account of promise 1. With a
ledger, whatever happens here is also queued there as a row, :meth:`RolloutBuffer.store` writes the rows of a rollout
and forgets the tokens, and :meth:`load_tokens` brings them back for the few samples that go on. It never talks to an
engine, a scorer or the data: ``rollout.collect`` moves things in and out, ``loop`` stores and settles. One owner, one
thread.

A group is *open* (samples wait, run or are paused), *scoring* (all samples finished, verdicts pending), *ready*
(complete, not admitted) or *admitted*, and ends as trained, rejected[filter] or failed[reason].
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlpost.errors import RunError, explain
from rlpost.rollout.admission import FIRST_BEGUN, FIRST_COMPLETE, Assignment
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.open_groups import FINISHED, JUDGED, PAUSED, RUNNING, WAITING, OpenGroup, OpenSample
from rlpost.rollout.oversampling import OversampleController
from rlpost.rollout.staleness import may_admit, may_draw
from rlpost.types import Group, Prompt

REWARD_FAILED = "reward"
RESTARTED, ROLLED_BACK = "discarded[restart]", "discarded[rollback]"


class LedgerError(RuntimeError):
    """The conservation check failed: a group or token is unaccounted for. Always a bug of ours."""


class RolloutBuffer:
    """See the module docstring. ``begin_step`` and ``settle`` frame each step of the loop.

    Args:
        groups_per_step: N, groups trained per step.
        samples_per_group: G.
        oversample: groups that may be open or admitted in a step, over N.
        max_staleness: S, in policy versions.
        restart_stale: draw and admit without regard to age, and restart a group that has grown too old.
        ledger: where everything is written down; None keeps tokens in memory (simulations).
        admission: which complete groups a step may take (``rollout.admission``).
        controller: chooses the limit on open groups anew in each step; None: ``oversample`` throughout.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        samples_per_group: int,
        oversample: float,
        max_staleness: int,
        restart_stale: bool = False,
        ledger: Ledger | None = None,
        admission: str = FIRST_COMPLETE,
        controller: OversampleController | None = None,
    ) -> None:
        self.groups_per_step = groups_per_step
        self.samples_per_group = samples_per_group
        self.max_open = int(oversample * groups_per_step)
        self.max_staleness = max_staleness
        self.restart_stale = restart_stale
        self.ledger = ledger
        self.admission = admission
        self.controller = controller
        self.open_limit_reason = ""  # the controller's, for the step under way
        self.step = 0
        self.groups: dict[str, OpenGroup] = {}  # untrained and not admitted, by uid, in the order drawn
        self.admitted: list[OpenGroup] = []
        self.num_drawn = 0
        self.tokens_received = 0
        self.groups_ended: Counter[str] = Counter()  # "trained", "rejected[...]", "failed[...]"
        self.tokens_ended: Counter[str] = Counter()  # the same, and "discarded[...]"
        self._ledger_s = 0.0
        self._num_by_oldest: Counter[int | None] = Counter()  # groups in ``groups`` by oldest_version
        self._ready: dict[str, OpenGroup] = {}
        self._assignment: Assignment | None = None  # of this step; with first_begun only
        self._ready_assigned: dict[str, OpenGroup] = {}  # those of ``_ready``
        self._startable: list[tuple[int, int, int, str]] = []  # heap of (deadline, unfinished, order, uid)

    # ---- a step's frame -------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        assert not self.admitted, "settle() must be called before the next step begins"
        self.step = step
        self._startable = []
        for group in self.groups.values():
            if self.restart_stale and self._is_late(group) and not any(s.state == FINISHED for s in group.samples):
                self._restart(group)
            group.count_samples()
            self._offer(group)
        if self.admission == FIRST_BEGUN:
            self._assign()
        if self.controller is not None:
            waiting = 0
            if self.admission == FIRST_BEGUN:  # those that wait now, and as many again as the step trains
                waiting = len(self._ready) - len(self._ready_assigned) + self.groups_per_step
            choice = self.controller.choose(waiting=waiting)
            self.max_open, self.open_limit_reason = choice.max_open, choice.reason
        if self.ledger is not None:
            with self._timed():
                self.ledger.record("begins", None, step + 1)
                self.ledger.commit()

    def rollout(self) -> list[Group]:
        """The groups admitted in this step, tokens and all."""
        self.load_tokens(self.admitted)
        return [g.freeze() for g in self.admitted]

    def store(self) -> None:
        """Write down everything since the last call; tokens of groups that wait are only in the ledger from here on."""
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
        """The admitted groups leave: trained, or failed[reason] where ``failed`` gives a uid its reason.

        The tokens of a sample without a reward are in no batch: they end as failed in a trained group, too.
        """
        failed = failed or {}
        if self.controller is not None:
            self.controller.step_done([[s.num_tokens for s in group.samples] for group in self.admitted])
        for group in self.admitted:
            self._end(group, f"failed[{failed[group.uid]}]" if group.uid in failed else "trained")
        self.admitted = []
        if self.ledger is not None:
            with self._timed():
                self.ledger.record("steps", self.step + 1, json.dumps(self.totals()))
                self.ledger.commit()

    def release_admitted(self) -> None:
        """A step that is stopped half-way: what was admitted waits again, complete, for the same step's next try."""
        for group in self.admitted:
            group.state = "ready"
            self._num_by_oldest[group.oldest_version] += 1
        untrained = [*self.groups.values(), *self.admitted]
        self.groups = {g.uid: g for g in sorted(untrained, key=lambda g: g.order)}
        self._ready |= {g.uid: g for g in self.admitted}
        self.admitted = []

    # ---- drawing and scheduling -----------------------------------------------------------------------------

    def may_draw(self) -> bool:
        """Whether one more prompt may be drawn in this step."""
        if len(self.groups) + len(self.admitted) >= self.max_open:
            return False
        return self.restart_stale or may_draw(
            len(self.groups),
            admitted=len(self.admitted),
            groups_per_step=self.groups_per_step,
            max_staleness=self.max_staleness,
        )

    def add(self, prompt: Prompt) -> None:
        samples = [OpenSample(index=i) for i in range(self.samples_per_group)]
        group = OpenGroup(prompt=prompt, order=self.num_drawn, drawn_step=self.step, samples=samples)
        assert prompt.uid not in self.groups, f"prompt {prompt.uid} was drawn twice"
        self.groups[prompt.uid] = group
        self.num_drawn += 1
        self._num_by_oldest[None] += 1
        if self.ledger is not None:
            self.ledger.record_draw(group.order, self.step + 1, prompt, len(samples))
        group.count_samples()
        if self._assignment is not None:
            self._assignment.add(group)
        self._offer(group)

    def next_samples(self, limit: int) -> list[tuple[OpenGroup, OpenSample]]:
        """The samples to start next, of one group and at most ``limit``; none where none waits. Earliest deadline first
        (so carried-over groups come first), then the group with the fewest samples left, then the oldest. They count as
        running from here on."""
        while self._startable:
            entry = self._startable[0]
            group = self.groups.get(entry[3])
            if group is None or not group.num_startable or entry != self._entry(group):
                heapq.heappop(self._startable)  # a later entry of the same group holds its place
                continue
            found = [(group, s) for s in group.samples if s.state == WAITING or s.state == PAUSED][:limit]
            group.num_startable -= len(found)
            for _, sample in found:
                sample.state, sample.mixed_kv = RUNNING, False
                if sample.first_step < 0:
                    sample.first_step = self.step
                    self._record("launches", group, sample)
            return found
        return []

    def go_on(self, uid: str, index: int) -> tuple[OpenGroup, OpenSample]:
        """A paused sample whose KV cache the engine kept runs again, before anything is scheduled."""
        group = self.groups[uid]
        sample = group.samples[index]
        assert sample.state == PAUSED and not self.restart_stale, (uid, index, sample.state)
        sample.state, sample.mixed_kv = RUNNING, True
        group.num_startable -= 1
        return group, sample

    def load_tokens(self, groups: Iterable[OpenGroup], samples: Iterable[OpenSample] | None = None) -> None:
        """Bring back from the ledger the tokens of ``samples``, one of each group, or of all samples of ``groups``."""
        pairs = zip(groups, samples, strict=True) if samples else ((g, s) for g in groups for s in g.samples)
        evicted = [(g, s) for g, s in pairs if s.evicted]
        if not evicted:
            return
        assert self.ledger is not None, "without a ledger nothing is evicted"
        with self._timed():
            stored = self.ledger.read_segments([(g.order, s.index, g.attempt) for g, s in evicted])
            for (_, sample), segments in zip(evicted, stored, strict=True):
                assert not sample.segments, "a sample goes on only after its tokens are back"
                sample.segments, sample.evicted = segments, False

    # ---- what the engine and the scorer report --------------------------------------------------------------

    def receive(
        self, group: OpenGroup, sample: OpenSample, token_ids: np.ndarray, logprobs: np.ndarray, finish_reason: str
    ) -> None:
        """New tokens of a running sample, in order, each exactly once."""
        assert sample.state == RUNNING and len(token_ids) == len(logprobs), (group.uid, sample.index, sample.state)
        if len(token_ids):
            sample.append(token_ids, logprobs)
            self.tokens_received += len(token_ids)
            if group.oldest_version is None:
                self._set_oldest(group, self.step)
        if finish_reason:
            self._seal(group, sample)
            sample.finish_reason = finish_reason
            sample.state = FINISHED
            group.num_unfinished -= 1
            self._record("finishes", group, sample, finish_reason)
            if not group.num_unfinished:
                group.state = "scoring"
            elif group.num_startable:
                self._offer(group)

    def pause(self, group: OpenGroup, sample: OpenSample, *, go_on: bool = True) -> None:
        """A running sample left the engine unfinished and keeps its tokens. ``go_on``: it may be started again in this
        step, else with the next one."""
        self._seal(group, sample)
        sample.state = PAUSED if sample.num_tokens else WAITING
        group.num_startable += 1
        if go_on:
            self._offer(group)

    def judge(
        self,
        group: OpenGroup,
        sample: OpenSample,
        reward: float | None,
        parts: Mapping[str, float],
        failure: str | None,
    ) -> bool:
        """A verdict arrived; True when it was the group's last one, which makes the group ready."""
        known = (group.uid, sample.index, reward, failure)
        assert sample.state == FINISHED and (reward is None) == (failure is not None), known
        sample.reward, sample.reward_parts, sample.failure, sample.state = reward, parts, failure, JUDGED
        if self.ledger is not None:
            self._record("verdicts", group, sample, reward, json.dumps(dict(parts)), failure)
        group.num_unjudged -= 1
        if not group.num_unjudged:
            group.state = "ready"
            self._ready[group.uid] = group
            if self._assignment is not None and group in self._assignment:
                self._ready_assigned[group.uid] = group
            return True
        return False

    def unjudged(self) -> list[tuple[OpenGroup, OpenSample]]:
        """Finished samples without a verdict: what must be handed to a fresh scorer after a resume."""
        return [(g, s) for g in self.groups.values() for s in g.samples if s.state == FINISHED]

    # ---- admission ------------------------------------------------------------------------------------------

    def ready(self) -> list[OpenGroup]:
        """Complete groups in the order they are considered: earliest deadline first, then age. With first_begun, only
        those that are assigned to this step."""
        ready = self._ready if self._assignment is None else self._ready_assigned
        return sorted(ready.values(), key=lambda g: (g.deadline(self.step, self.max_staleness), g.order))

    def try_admit(self, group: OpenGroup) -> bool:
        """Admit a ready group to this step's batch if the staleness rule allows it."""
        if not self._may_admit(group):
            return False
        self._leave(group)
        group.state = "admitted"
        self.admitted.append(group)
        return True

    def drop(self, group: OpenGroup, end: str) -> None:
        """A ready group that will not train: ``end`` is rejected[filter] or failed[reason]."""
        self._leave(group)
        if self._assignment is not None and group in self._assignment:
            replacement = self._assignment.replace_dropped(self.groups)
            if replacement is not None and replacement.state == "ready":
                self._ready_assigned[replacement.uid] = replacement
        if self.controller is not None:
            self.controller.note_dropped([s.num_tokens for s in group.samples])
        self._end(group, end)

    # ---- the account ----------------------------------------------------------------------------------------

    def states(self) -> Counter[str]:
        """Number of untrained groups by phase: waiting, in_flight, paused, scoring, ready, admitted."""
        return Counter([g.phase() for g in self.groups.values()] + ["admitted"] * len(self.admitted))

    def totals(self) -> dict[str, Any]:
        """The counters as JSON values; what rollbacks discarded is counted by the ledger and left out."""
        return {
            "num_drawn": self.num_drawn,
            "tokens_received": self.tokens_received - self.tokens_ended[ROLLED_BACK],
            "groups_ended": dict(self.groups_ended),
            "tokens_ended": {k: v for k, v in self.tokens_ended.items() if k != ROLLED_BACK},
        }

    def check_conservation(self, *, under_way: bool = False) -> None:
        """Every group drawn and token received stands in exactly one known place, the ledger holds what memory does
        not, and no group that was due in this step was left over; else LedgerError with the numbers.

        groups: drawn = waiting + in flight + paused + scoring + ready + admitted + trained + rejected + failed.
        tokens: received = held by untrained groups + trained + rejected + failed + discarded. Holds after a step's last
        admission; ``under_way``: the step was stopped before that, and what is due in it may wait.
        """
        untrained = [*self.groups.values(), *self.admitted]
        groups_known = len(untrained) + sum(self.groups_ended.values())
        held = sum(g.num_tokens for g in untrained)
        tokens_known = held + sum(self.tokens_ended.values())
        if groups_known != self.num_drawn or tokens_known != self.tokens_received:
            raise LedgerError(
                f"conservation check failed at step {self.step}: {self.num_drawn} groups drawn, {groups_known} known "
                f"({dict(self.states())}, {dict(self.groups_ended)}); {self.tokens_received} tokens received, "
                f"{tokens_known} known ({held} held, {dict(self.tokens_ended)})"
            )
        last = self.step - under_way
        late = [g.uid for g in self.groups.values() if g.deadline(self.step, self.max_staleness) <= last]
        if late and not self.restart_stale:
            raise LedgerError(f"groups past their staleness deadline at step {self.step}: {late[:8]}")
        by_oldest = Counter(g.oldest_version for g in self.groups.values())
        if by_oldest != self._num_by_oldest or self._ready.keys() != {g.uid for g in untrained if g.state == "ready"}:
            raise LedgerError(
                f"groups are counted wrongly at step {self.step}: by oldest version {dict(self._num_by_oldest)}, found "
                f"{dict(by_oldest)}; {len(self._ready)} ready"
            )

    def check_ledger(self) -> None:
        """The ledger's rows hold the same groups and tokens as memory does; call it between steps, after a store."""
        assert self.ledger is not None and not self.admitted
        here = len(self.groups), sum(g.num_tokens for g in self.groups.values())
        there = self.ledger.held()
        if here != there:
            raise LedgerError(f"step {self.step}: (groups, tokens) held are {here} in memory, {there} in the ledger")

    def lengths(self, first: int = 0) -> tuple[list[int], list[int]]:
        """Of the untrained groups drawn as number ``first`` or later: lengths of the responses that are done, and
        tokens so far of those that are to go on."""
        samples = [s for g in self.groups.values() if g.order >= first for s in g.samples]
        return [s.num_tokens for s in samples if s.finish_reason], [
            s.num_tokens for s in samples if not s.finish_reason
        ]

    def longest_unfinished(self) -> int:
        """Tokens so far of the longest response that is to go on."""
        return max(self.lengths()[1], default=0)

    # ---- durable state --------------------------------------------------------------------------------------

    def state_dict(self, *, under_way: bool = False) -> dict[str, Any]:
        """What the ledger's rows do not say, as JSON values. Call it between steps, or ``under_way`` after
        :meth:`release_admitted`."""
        assert not self.admitted and not any(s.state == RUNNING for g in self.groups.values() for s in g.samples)
        sizes = {name: getattr(self, name) for name in ("groups_per_step", "samples_per_group", "max_staleness")}
        state = {**sizes, "step": self.step, "under_way": under_way, "totals": self.totals()}
        if self.controller is not None:
            state["controller"] = self.controller.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], groups: Iterable[OpenGroup], *, rolled_back: int = 0) -> None:
        """Goes on where ``state`` was taken, with the ledger's open groups.

        rolled_back: tokens that rollbacks have discarded so far, in all lives of the run.

        Raises RunError where groups would be of another size, and where fewer groups a step, or a smaller staleness,
        would leave waiting groups that can no longer be trained in time (unless stale ones are restarted).
        """
        size = state["samples_per_group"]
        if self.samples_per_group != size:
            do = "set it as it was, or use another name"
            raise RunError(explain("resuming: rollout.samples_per_group", self.samples_per_group, str(size), do))
        for name in ("groups_per_step", "max_staleness"):
            if getattr(self, name) < state[name] and not self.restart_stale:
                do = "set it as it was, or use another name, or rollout.on_stale=restart"
                raise RunError(explain(f"resuming: rollout.{name}", getattr(self, name), f">= {state[name]}", do))
        totals = state["totals"]
        self.step, self.num_drawn = state["step"], totals["num_drawn"]
        self.tokens_received = totals["tokens_received"]
        self.groups_ended = Counter(totals["groups_ended"])
        self.tokens_ended = Counter(totals["tokens_ended"])
        self.count_rolled_back(rolled_back)
        if self.controller is not None and "controller" in state:  # absent where the ratio was fixed so far
            self.controller.load_state_dict(state["controller"])
        self.groups = {g.uid: g for g in groups}
        self.admitted = []
        self._ready = {g.uid: g for g in self.groups.values() if g.state == "ready"}
        self._num_by_oldest = Counter(g.oldest_version for g in self.groups.values())
        self.check_conservation(under_way=state["under_way"])

    def count_rolled_back(self, num_tokens: int) -> None:
        """Tokens that earlier lives of this run received and a rollback discarded."""
        self.tokens_received += num_tokens
        if num_tokens:
            self.tokens_ended[ROLLED_BACK] += num_tokens

    def take_ledger_s(self) -> float:
        """Seconds spent on the ledger's transactions, reads included, since the last call."""
        seconds, self._ledger_s = self._ledger_s, 0.0
        return seconds

    # ---- private --------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._ledger_s += time.perf_counter() - started

    def _may_admit(self, group: OpenGroup) -> bool:
        if self.restart_stale:
            return len(self.admitted) < self.groups_per_step and not self._is_late(group)
        slack = group.deadline(self.step, self.max_staleness) - self.step
        return may_admit(self._due(), slack, admitted=len(self.admitted), groups_per_step=self.groups_per_step)

    def _assign(self) -> None:
        self._assignment = Assignment(
            self.groups.values(), self.groups_per_step, step=self.step, max_staleness=self.max_staleness
        )
        self._ready_assigned = {uid: group for uid, group in self._ready.items() if group in self._assignment}

    def _is_late(self, group: OpenGroup) -> bool:
        return group.deadline(self.step, self.max_staleness) < self.step

    def _due(self) -> list[int]:
        """due[k]: groups with deadline step + k."""
        due = [0] * (self.max_staleness + 1)
        for oldest, count in self._num_by_oldest.items():
            due[(self.step if oldest is None else oldest) + self.max_staleness - self.step] += count
        return due

    def _leave(self, group: OpenGroup) -> None:
        del self.groups[group.uid]
        del self._ready[group.uid]
        self._ready_assigned.pop(group.uid, None)
        self._forget_oldest(group.oldest_version)

    def _end(self, group: OpenGroup, end: str) -> None:
        unscored = sum(s.num_tokens for s in group.samples if s.reward is None) if end == "trained" else 0
        self.groups_ended[end] += 1
        self.tokens_ended[end] += group.num_tokens - unscored
        if unscored:
            self.tokens_ended[f"failed[{REWARD_FAILED}]"] += unscored
        if self.ledger is not None:
            self.ledger.record("ends", group.order, self.step + 1, end, group.num_tokens, unscored)

    def _restart(self, group: OpenGroup) -> None:
        """Too old to be trained: its tokens are discarded, its prompt starts again under the new policy."""
        discarded = group.num_tokens
        group.attempt += 1
        self.tokens_ended[RESTARTED] += discarded
        if self.ledger is not None:
            self.ledger.record("restarts", group.order, group.attempt, self.step + 1, discarded)
        for sample in group.samples:
            sample.restart()
        group.state = "open"
        group.frozen = None
        self._ready.pop(group.uid, None)
        self._set_oldest(group, None)

    def _set_oldest(self, group: OpenGroup, version: int | None) -> None:
        self._forget_oldest(group.oldest_version)
        self._num_by_oldest[version] += 1
        group.oldest_version = version

    def _forget_oldest(self, version: int | None) -> None:
        self._num_by_oldest[version] -= 1
        if not self._num_by_oldest[version]:
            del self._num_by_oldest[version]  # else one more is looked at with every step

    def _seal(self, group: OpenGroup, sample: OpenSample) -> None:
        segment = sample.seal(self.step)
        if segment is not None and self.ledger is not None:
            self.ledger.record_segment(group.order, sample.index, group.attempt, self.step + 1, segment)

    def _record(self, table: str, group: OpenGroup, sample: OpenSample, *values: Any) -> None:
        if self.ledger is not None:
            self.ledger.record(table, group.order, sample.index, group.attempt, self.step + 1, *values)

    def _entry(self, group: OpenGroup) -> tuple[int, int, int, str]:
        # With first_begun nothing but the order begun counts.
        unfinished = group.num_unfinished if self.admission == FIRST_COMPLETE else 0
        return (group.deadline(self.step, self.max_staleness), unfinished, group.order, group.uid)

    def _offer(self, group: OpenGroup) -> None:
        if self.restart_stale and self._is_late(group):
            return  # restarted as soon as its verdicts are in
        if group.num_startable:
            heapq.heappush(self._startable, self._entry(group))
