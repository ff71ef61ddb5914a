"""Which complete groups may train in a step, besides what ``rollout.staleness`` demands.

*first_complete*: any; a step takes the groups that are complete first, and these tend to have short responses.

*first_begun*: only those of the N that are due first, ties in the order drawn (ERNIE 5.0's unbiased replay buffer: the
groups assigned to a step train in it, the others are only generated ahead). A deadline comes from when a group's first
token was sampled, never from how long its responses are, so long groups train when short ones begun with them do.

It agrees with the staleness bound: let N - a be still to be admitted and take a group of rank r <= N - a by
deadline. For k below its slack the groups due by step + k rank before it, so U(k) <= r - 1 <= (N - a - 1) + k N;
from there on both sides of invariant (I) fall by one. So rule 2 allows whatever is assigned, and since those
groups are also started first, a step still ends. Pure; ``rollout.buffer`` is the caller.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from rlpost.rollout.open_groups import OpenGroup

FIRST_COMPLETE, FIRST_BEGUN = "first_complete", "first_begun"


def assigned(groups: Iterable[OpenGroup], count: int, *, step: int, max_staleness: int) -> set[str]:
    """Uids of the ``count`` untrained groups that may train next with *first_begun*. O(groups)."""
    first = heapq.nsmallest(count, groups, key=lambda g: (g.deadline(step, max_staleness), g.order))
    return {g.uid for g in first}
