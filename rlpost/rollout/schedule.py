"""Which sample starts next, and what a step may draw and admit: the strategy's rules applied to the open groups.

Reads groups and never changes their samples. ``rollout.buffer``, its only caller, reports what happens to a group: it
was added, has samples to start, has its first token, became ready, left. The rules themselves are in
``rollout.staleness``, ``rollout.admission`` and ``rollout.oversampling``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from rlpost.rollout.accounts import LedgerError
from rlpost.rollout.admission import Assignment
from rlpost.rollout.open_groups import OpenGroup
from rlpost.rollout.oversampling import OversampleController
from rlpost.rollout.staleness import may_admit, may_draw
from rlpost.rollout.strategy import FIRST_COMPLETE, FIRST_STARTED, ROUND_ROBIN, RolloutStrategy


class Schedule:
    """The schedule of one buffer.

    Args:
        strategy: the numbers and rules.
        slots: samples decoded at once, which an adaptive strategy keeps busy.
    """

    def __init__(self, strategy: RolloutStrategy, *, slots: int = 1) -> None:
        self.strategy = strategy
        self.controller = OversampleController(strategy, slots=slots) if strategy.adaptive else None
        self.max_open = strategy.max_open
        self.open_limit_reason = ""  # the controller's, for the current step
        self.step = 0
        self._num_by_oldest: Counter[int | None] = Counter()  # untrained groups by their oldest token's version
        self._ready: dict[str, OpenGroup] = {}
        self._assignment: Assignment | None = None  # of this step; only with first_begun
        self._ready_assigned: dict[str, OpenGroup] = {}  # the assigned ones in ``_ready``
        self._startable: list[tuple[int, int, int, str]] = []  # heap of ``_entry``; stale entries are skipped

    # ---- the step -------------------------------------------------------------------------------------------

    def begin_step(self, step: int, groups: Collection[OpenGroup]) -> None:
        """``groups``: all untrained groups in their current state."""
        self.step = step
        self._startable = []
        for group in groups:
            self.offer(group)
        if self.strategy.admission == FIRST_STARTED:
            self._assign(groups)
        if self.controller is not None:
            waiting = 0
            if self.strategy.admission == FIRST_STARTED:  # those waiting now, plus as many as the step trains
                waiting = len(self._ready) - len(self._ready_assigned) + self.strategy.groups_per_step
            choice = self.controller.choose(waiting=waiting)
            self.max_open, self.open_limit_reason = choice.max_open, choice.reason

    def step_done(self, trained: Sequence[OpenGroup]) -> None:
        if self.controller is not None:
            self.controller.step_done([[s.num_tokens for s in group.samples] for group in trained])

    # ---- starting samples -----------------------------------------------------------------------------------

    def may_draw(self, num_untrained: int, num_admitted: int) -> bool:
        """Whether one more prompt may be drawn in this step."""
        if num_untrained + num_admitted >= self.max_open:
            return False
        return self.strategy.restart_stale or may_draw(
            num_untrained,
            admitted=num_admitted,
            groups_per_step=self.strategy.groups_per_step,
            max_staleness=self.strategy.max_staleness,
        )

    def offer(self, group: OpenGroup) -> None:
        """The group may have samples to start."""
        if self.strategy.restart_stale and self.is_late(group):
            return  # restarted once its reward results are in
        if group.num_startable:
            heapq.heappush(self._startable, self._entry(group))

    def next_group(self, groups: Mapping[str, OpenGroup]) -> OpenGroup | None:
        """The group whose samples start next: earliest deadline first (so carried-over groups come first), then the
        fewest samples left, then the oldest. ``groups``: the untrained ones, by uid."""
        while self._startable:
            entry = self._startable[0]
            group = groups.get(entry[3])
            if group is not None and group.num_startable and entry == self._entry(group):
                return group
            heapq.heappop(self._startable)  # a later entry of the same group replaces it
        return None

    @property
    def samples_at_once(self) -> int | None:
        """How many samples of one group are started before the next group's turn; None: all that wait."""
        return 1 if self.strategy.order == ROUND_ROBIN else None

    # ---- admission ------------------------------------------------------------------------------------------

    def candidates(self) -> list[OpenGroup]:
        """Complete groups in the order they are considered: earliest deadline first, then age. With first_begun, only
        those assigned to this step."""
        ready = self._ready if self._assignment is None else self._ready_assigned
        return sorted(ready.values(), key=lambda g: (self._deadline(g), g.order))

    def may_admit(self, group: OpenGroup, num_admitted: int) -> bool:
        """Whether the staleness rule allows a ready group to train in this step."""
        strategy = self.strategy
        if strategy.restart_stale:
            return num_admitted < strategy.groups_per_step and not self.is_late(group)
        slack = self._deadline(group) - self.step
        return may_admit(self._due(), slack, admitted=num_admitted, groups_per_step=strategy.groups_per_step)

    # ---- what happens to a group ----------------------------------------------------------------------------

    def added(self, group: OpenGroup) -> None:
        """The group was just drawn."""
        self._num_by_oldest[None] += 1
        if self._assignment is not None:
            self._assignment.add(group)
        self.offer(group)

    def set_oldest(self, group: OpenGroup, version: int | None) -> None:
        """Set the version of its oldest token; None: it has none (any more)."""
        self._forget_oldest(group.oldest_version)
        self._num_by_oldest[version] += 1
        group.oldest_version = version

    def became_ready(self, group: OpenGroup) -> None:
        self._ready[group.uid] = group
        if self._assignment is not None and group in self._assignment:
            self._ready_assigned[group.uid] = group

    def restarted(self, group: OpenGroup) -> None:
        self._ready.pop(group.uid, None)
        self.set_oldest(group, None)

    def left(self, group: OpenGroup) -> None:
        """A ready group was admitted or dropped."""
        del self._ready[group.uid]
        self._ready_assigned.pop(group.uid, None)
        self._forget_oldest(group.oldest_version)

    def dropped(self, group: OpenGroup, groups: Mapping[str, OpenGroup]) -> None:
        """A group that left will not train; ``groups`` are those that still can."""
        if self._assignment is not None and group in self._assignment:
            replacement = self._assignment.replace_dropped(groups)
            if replacement is not None and replacement.state == "ready":
                self._ready_assigned[replacement.uid] = replacement
        if self.controller is not None:
            self.controller.note_dropped([s.num_tokens for s in group.samples])

    def returned(self, groups: Iterable[OpenGroup]) -> None:
        """Admitted groups become ready again, for when the same step is retried."""
        for group in groups:
            self._num_by_oldest[group.oldest_version] += 1
            self._ready[group.uid] = group

    def load(self, groups: Collection[OpenGroup]) -> None:
        """Replace all groups."""
        self._ready = {g.uid: g for g in groups if g.state == "ready"}
        self._num_by_oldest = Counter(g.oldest_version for g in groups)

    # ---- deadlines ------------------------------------------------------------------------------------------

    def is_late(self, group: OpenGroup) -> bool:
        return self._deadline(group) < self.step

    def check(self, groups: Collection[OpenGroup], *, under_way: bool) -> None:
        """Raises LedgerError if a group due in this step (``under_way``: before it) is left, or if groups are
        miscounted. ``groups``: untrained and not admitted."""
        last = self.step - under_way
        late = [g.uid for g in groups if self._deadline(g) <= last]
        if late and not self.strategy.restart_stale:
            raise LedgerError(f"groups past their staleness deadline at step {self.step}: {late[:8]}")
        by_oldest = Counter(g.oldest_version for g in groups)
        if by_oldest != self._num_by_oldest or self._ready.keys() != {g.uid for g in groups if g.state == "ready"}:
            raise LedgerError(
                f"groups are miscounted at step {self.step}: by oldest version {dict(self._num_by_oldest)}, found "
                f"{dict(by_oldest)}; {len(self._ready)} ready"
            )

    def _deadline(self, group: OpenGroup) -> int:
        return group.deadline(self.step, self.strategy.max_staleness)

    def _due(self) -> list[int]:
        """due[k]: groups with deadline step + k."""
        max_staleness = self.strategy.max_staleness
        due = [0] * (max_staleness + 1)
        for oldest, count in self._num_by_oldest.items():
            due[(self.step if oldest is None else oldest) + max_staleness - self.step] += count
        return due

    def _assign(self, groups: Iterable[OpenGroup]) -> None:
        strategy = self.strategy
        self._assignment = Assignment(
            groups, strategy.groups_per_step, step=self.step, max_staleness=strategy.max_staleness
        )
        self._ready_assigned = {uid: group for uid, group in self._ready.items() if group in self._assignment}

    def _forget_oldest(self, version: int | None) -> None:
        self._num_by_oldest[version] -= 1
        if not self._num_by_oldest[version]:
            del self._num_by_oldest[version]  # otherwise the table grows with every step

    def _entry(self, group: OpenGroup) -> tuple[int, int, int, str]:
        if self.strategy.order == ROUND_ROBIN:
            return (len(group.samples) - group.num_startable, 0, group.order, group.uid)
        # With first_begun, only the order in which groups were started counts.
        unfinished = group.num_unfinished if self.strategy.admission == FIRST_COMPLETE else 0
        return (self._deadline(group), unfinished, group.order, group.uid)
