"""Which complete groups may train in a step, in addition to the rules of ``rollout.staleness``.

*first_complete*: any; a step takes the groups that complete first, and these tend to have short responses.

*first_begun*: only the N groups that are due first, ties in the order drawn (ERNIE 5.0's unbiased replay buffer: the
groups assigned to a step train in it, the others are only generated ahead). A deadline depends on when a group's first
token was sampled, never on the length of its responses, so long groups train when short ones started with them do.

This agrees with the staleness bound: let N - a groups still have to be admitted, and take a group of rank r <= N - a by
deadline. For k below its slack, the groups due by step + k rank before it, so U(k) <= r - 1 <= (N - a - 1) + k N;
for larger k, both sides of invariant (I) fall by one. So rule 2 allows every assigned group, and since those groups are
also started first, a step still ends. Pure functions; ``rollout.schedule`` is the caller.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from rlpost.rollout.open_groups import OpenGroup


class Assignment:
    """The untrained groups that may train in a step with *first_begun*, updated as the step draws, admits and drops.

    Within a step no deadline moves (``rollout.staleness``) and a new group comes last, so the groups form one line, and
    the assigned ones are those up to a position in it. Admitting one leaves the position unchanged: one fewer remains
    to be admitted. Every operation takes amortized constant time, however many groups are open.

    Args:
        groups: untrained and not admitted.
        count: how many still have to be admitted.
    """

    def __init__(self, groups: Iterable[OpenGroup], count: int, *, step: int, max_staleness: int) -> None:
        self._step, self._max_staleness = step, max_staleness
        self._line = sorted(groups, key=self._key)
        self._end = min(count, len(self._line))  # position after the last assigned group
        self._missing = count - self._end  # assigned as soon as they are drawn

    def __contains__(self, group: OpenGroup) -> bool:
        return self._end > 0 and self._key(group) <= self._key(self._line[self._end - 1])

    def add(self, group: OpenGroup) -> None:
        """The group was just drawn."""
        self._line.append(group)
        if self._missing:
            self._missing -= 1
            self._end += 1

    def replace_dropped(self, untrained: Container[str]) -> OpenGroup | None:
        """An assigned group was dropped: returns its replacement, or None if there is none yet.

        ``untrained``: uids of the groups that still exist.
        """
        while self._end < len(self._line):
            self._end += 1
            if self._line[self._end - 1].uid in untrained:
                return self._line[self._end - 1]
        self._missing += 1
        return None

    def _key(self, group: OpenGroup) -> tuple[int, int]:
        return group.deadline(self._step, self._max_staleness), group.order
