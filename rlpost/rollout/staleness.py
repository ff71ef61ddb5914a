"""Bounded staleness by admission: two rules under which no group ever has to be restarted or discarded for its age.

Pure functions; ``rollout.schedule`` is the caller. N groups are trained per step, S is ``max_staleness``, ``a`` groups
have been admitted so far in this step. A group's *deadline* is the oldest policy version of any of its tokens, complete
siblings included, plus S: the last step in which it may be trained (during step s the policy version is s). A group
without tokens has the deadline step + S, the one it gets if its first token comes now.

Let U(k) be the number of untrained groups with deadline <= step + k. The invariant

    U(k) <= (N - a) + k N        for every k >= 0                                                            (I)

means that the groups due by step + k fit into the rest of this step and the k steps after it: it is the
schedulability test of earliest-deadline-first for unit jobs, N per time slot.

*(I) is maintained.* Drawing adds a group of deadline step + S, so it changes U(k) for k >= S only, where rule 1
(``may_draw``: untrained groups, the new one included, at most (S + 1) N - a) gives
U(k) <= (S + 1) N - a <= (N - a) + k N. Rule 2 (``may_admit``) allows an admission only if (I) holds afterwards.
Rejection and failure only lower U. A token cannot move a deadline: a group's first one sets it to step + S, which it
already was. At the end of the step a = N, so U(k) <= k N; the next step counts k from one step later and its
U'(k) = U(k + 1) <= (k + 1) N = (N - 0) + k N, which is (I) with a = 0. At the start nothing has been drawn.

*No deadline is missed.* After the last admission of a step a = N, and (I) with k = 0 gives U(0) <= 0: every group due
in this step has been admitted.

*The step always ends.* While a < N, the groups of the earliest deadline d are always admissible: for k < d - step
no group is due, so (I) afterwards reads 0 <= (N - a - 1) + k N; for k >= d - step both sides fall by one. The
scheduler starts groups in order of deadline, so such a group completes; and if there is none, U = 0 and a new one
may be drawn, because (S + 1) N - a >= 1.
"""

from __future__ import annotations

from collections.abc import Sequence


def may_draw(num_untrained: int, *, admitted: int, groups_per_step: int, max_staleness: int) -> bool:
    """Rule 1: whether one more group may be drawn when ``num_untrained`` drawn groups are not yet admitted."""
    return num_untrained + 1 <= (max_staleness + 1) * groups_per_step - admitted


def may_admit(due: Sequence[int], slack: int, *, admitted: int, groups_per_step: int) -> bool:
    """Rule 2: whether a complete group with deadline step + ``slack`` may be admitted now.

    Args:
        due: due[k] = untrained groups (the candidate included) with deadline exactly step + k, k = 0..S.
        slack: the candidate's deadline minus the step, 0..S.
        admitted: ``a`` before this admission.
    """
    left = groups_per_step - admitted - 1
    cumulative = 0
    for k, count in enumerate(due):
        cumulative += count - (k == slack)
        if cumulative > left + k * groups_per_step:
            return False
    return left >= 0
