"""The staleness rules against an adversary: no order of completions makes a group miss its deadline."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.rollout.staleness import may_admit, may_draw


def test_draw_counts_the_new_group_and_what_was_admitted():
    assert may_draw(11, admitted=0, groups_per_step=4, max_staleness=2)
    assert not may_draw(12, admitted=0, groups_per_step=4, max_staleness=2)
    assert not may_draw(11, admitted=1, groups_per_step=4, max_staleness=2)


def test_admission_is_refused_where_due_groups_need_the_room():
    # N = 2, nothing admitted, two groups due now: a later one must wait, a due one may go.
    assert not may_admit([2, 0, 1], 2, admitted=0, groups_per_step=2)
    assert may_admit([2, 0, 1], 0, admitted=0, groups_per_step=2)
    # with one due now there is room for one other
    assert may_admit([1, 0, 1], 2, admitted=0, groups_per_step=2)
    # the next step's capacity counts too: 3 due by step + 1 fit into 2 + 2 - 1, 4 do not
    assert may_admit([0, 3, 1], 2, admitted=0, groups_per_step=2)
    assert not may_admit([0, 4, 1], 2, admitted=0, groups_per_step=2)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.data())
def test_no_adversary_breaks_the_bound_or_stalls_a_step(groups_per_step, max_staleness, data):
    """An adversary draws whenever allowed and picks which groups complete; due groups are generated first."""
    untrained: list[int] = []  # deadlines
    for step in range(8):
        admitted = 0
        while admitted < groups_per_step:
            while may_draw(
                len(untrained), admitted=admitted, groups_per_step=groups_per_step, max_staleness=max_staleness
            ):
                untrained.append(step + max_staleness)
                if not data.draw(st.booleans()):
                    break
            assert untrained, "a step must always be able to go on"
            due = [untrained.count(step + k) for k in range(max_staleness + 1)]
            allowed = [
                d
                for d in set(untrained)
                if may_admit(due, d - step, admitted=admitted, groups_per_step=groups_per_step)
            ]
            assert min(untrained) in allowed, "the earliest deadline is always admissible"
            untrained.remove(max(allowed) if data.draw(st.booleans()) else data.draw(st.sampled_from(sorted(allowed))))
            admitted += 1
        assert all(d > step for d in untrained), "a group missed its deadline"
