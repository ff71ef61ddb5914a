"""Admission in the order begun: what a step trains does not depend on how long responses are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.rollout.admission import Assignment
from rlpost.rollout.open_groups import OpenGroup
from rlpost.rollout.staleness import may_admit
from rlpost.types import Prompt
from tests.rollout.simulation import run


def draws(groups):
    return sorted(int(g.uid.removeprefix("0:")) for g in groups)


def mean_length(history):
    return np.mean([s.num_tokens for groups, _ in history for g in groups for s in g.samples])


def test_each_step_trains_the_groups_begun_first():
    _, history = run(12, n=4, g=3, oversample=3.0, staleness=3, admission="first_begun")
    assert [draws(groups) for groups, _ in history] == [list(range(4 * k, 4 * k + 4)) for k in range(12)]
    assert sum(stats.num_resumed for _, stats in history) > 0, "nothing was generated ahead"
    assert any(draws(g) != list(range(4 * k, 4 * k + 4)) for k, (g, _) in enumerate(run(12, oversample=3.0)[1]))


def test_early_steps_train_no_shorter_responses_than_later_ones():
    """First-complete admission begins with what is short; in order begun, the first steps are like all others."""
    everything = mean_length(run(40, n=4, g=3, oversample=1.0, staleness=0)[1])
    first, begun = (
        mean_length(run(40, n=4, g=3, oversample=4.0, staleness=9, slots=32, admission=admission)[1][:6])
        for admission in ("first_complete", "first_begun")
    )
    population = mean_length(run(6, n=4, g=3, oversample=1.0, staleness=0)[1])  # the same prompts, all of them
    assert begun == population and first < 0.9 * everything


def test_rejected_groups_make_room_for_the_next_and_no_deadline_is_missed():
    def reject(group):
        return "odd" if int(group.uid.removeprefix("0:")) % 3 == 0 else None

    buffer, history = run(20, n=4, g=3, oversample=3.0, staleness=3, reject=reject, admission="first_begun")
    kept = [n for n in range(1000) if n % 3]
    assert [draws(groups) for groups, _ in history] == [kept[4 * k : 4 * k + 4] for k in range(20)]
    assert buffer.accounts.groups_ended["rejected[odd]"] >= 39
    for step, (groups, _) in enumerate(history):
        assert min(s.policy_version for g in groups for x in g.samples for s in x.segments) >= step - 3


@settings(max_examples=300, deadline=None)
@given(
    ages=st.lists(st.integers(0, 4), max_size=25),
    n=st.integers(1, 5),
    taken=st.integers(0, 4),
    max_staleness=st.integers(0, 4),
)
def test_what_is_assigned_the_staleness_rule_allows(ages, n, taken, max_staleness):
    taken = min(taken, n - 1)
    step = 10
    due = [0] * (max_staleness + 1)
    groups = []
    for order, age in enumerate(ages):
        if age > max_staleness:
            continue
        slack = max_staleness - age
        if sum(due[: slack + 1]) >= (n - taken) + slack * n:
            continue  # there would be more than fit
        due[slack] += 1
        prompt = Prompt(uid=str(order), token_ids=np.zeros(1, np.int32), text="")
        groups.append(OpenGroup(prompt=prompt, order=order, drawn_step=step, oldest_version=step - age))
    cumulative = np.cumsum(due)
    if any(c > (n - taken) + k * n for k, c in enumerate(cumulative)):
        return  # invariant (I) does not hold, so the buffer is never in this state
    assignment = Assignment(groups, n - taken, step=step, max_staleness=max_staleness)
    chosen = {group.uid for group in groups if group in assignment}
    assert len(chosen) == min(len(groups), n - taken)
    for group in groups:
        if group.uid in chosen:
            slack = group.deadline(step, max_staleness) - step
            assert may_admit(due, slack, admitted=taken, groups_per_step=n)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    ages=st.lists(st.integers(0, 4), max_size=20),
    n=st.integers(1, 6),
)
def test_the_assignment_follows_every_draw_admission_and_drop(data, ages, n):
    """After any moves it holds the first of the line that are left, as sorting all groups again would find them."""
    step, staleness = 10, 4
    groups = {str(k): _group(k, step, oldest=step - age) for k, age in enumerate(ages)}
    assignment = Assignment(groups.values(), n, step=step, max_staleness=staleness)
    left, num_drawn = n, len(groups)
    for move in data.draw(st.lists(st.sampled_from(["draw", "admit", "drop"]), max_size=25)):
        inside = [g for g in groups.values() if g in assignment]
        if move == "draw":
            group = _group(num_drawn, step, oldest=None)
            groups[group.uid], num_drawn = group, num_drawn + 1
            assignment.add(group)
        elif move == "admit" and inside and left > 1:
            group = data.draw(st.sampled_from(inside))
            del groups[group.uid]
            left -= 1
        elif move == "drop" and groups:
            group = data.draw(st.sampled_from(list(groups.values())))
            del groups[group.uid]
            if group in assignment:
                assignment.replace_dropped(groups)
        line = sorted(groups.values(), key=lambda g: (g.deadline(step, staleness), g.order))
        assert {g.uid for g in groups.values() if g in assignment} == {g.uid for g in line[:left]}


def _group(order, step, *, oldest):
    prompt = Prompt(uid=str(order), token_ids=np.zeros(1, np.int32), text="")
    return OpenGroup(prompt=prompt, order=order, drawn_step=step, oldest_version=oldest)
