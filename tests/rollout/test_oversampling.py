"""The adaptive limit on open groups: hand-worked numbers, and what it does to a simulated run."""

import json

import pytest

from rlpost.rollout.collect import collect
from rlpost.rollout.oversampling import OversampleController
from rlpost.rollout.strategy import RolloutStrategy
from tests.rollout.simulation import build, finish_step, heavy_tailed, prompts


def controller(*, n=4, g=2, s=4, slots=16, start=2.0):
    strategy = RolloutStrategy(groups_per_step=n, samples_per_group=g, max_staleness=s, oversample=start, adaptive=True)
    return OversampleController(strategy, slots=slots)


def test_the_limit_is_what_a_step_trains_and_what_keeps_the_slots_busy():
    choosing = controller()
    assert choosing.choose().max_open == 8 and "nothing seen" in choosing.choose().reason
    choosing.step_done([[10, 30]] * 4)  # mean 20, longest 30: a group keeps 2 x 20/30 slots busy, 16 slots need 12
    choice = choosing.choose()
    assert choice.max_open == 4 + 12
    assert "20 tokens on average and 30" in choice.reason and "takes 3.0 steps" in choice.reason


def test_the_limit_lies_between_a_step_and_the_staleness_budget():
    choosing = controller(s=1)
    choosing.step_done([[1, 99]] * 4)
    assert choosing.choose().max_open == 8 and "max_staleness=1" in choosing.choose().reason
    few = controller(slots=1)
    few.step_done([[20, 20]])
    assert few.choose().max_open == 5  # half a group fills the slot


def test_complete_groups_that_must_wait_hold_no_slot_and_leave_room_for_others():
    choosing = controller()
    choosing.step_done([[10, 30]] * 4)
    assert choosing.choose(waiting=3).max_open == 4 + 12 + 3
    assert choosing.choose(waiting=30).max_open == 5 * 4


def test_in_the_order_begun_it_leaves_room_for_what_is_complete_too_early():
    for admission, room in (("first_complete", 0), ("first_begun", 4)):
        buffer, engine, scorer, settings = build(n=4, g=3, staleness=9, slots=24, admission=admission)
        buffer.schedule.controller = controller(n=4, g=3, s=9, slots=24)
        stream, most_blocked = prompts(), 0
        for step in range(12):
            choice = buffer.schedule.controller.choose()
            collect(engine, buffer, stream, scorer, settings, step=step)
            assert not step or buffer.schedule.max_open >= min(40, choice.max_open + room)
            most_blocked = max(most_blocked, buffer.schedule.max_open - choice.max_open - room)
            finish_step(buffer)
        assert (most_blocked > 0) == (room > 0), "complete groups that wait were not counted"


def test_averages_fade_and_dropped_groups_count_as_seen_but_not_accepted():
    choosing = controller()
    choosing.note_dropped([40, 40])
    choosing.step_done([[20, 20]])
    assert "30 tokens on average and 30" in choosing.choose().reason and "50% accepted" in choosing.choose().reason
    choosing.step_done([[10, 10]] * 2)  # (0.8 x 60 + 20) / (0.8 x 2 + 2)
    assert f"{(0.8 * 60 + 20) / 3.6:.0f} tokens on average" in choosing.choose().reason


def test_a_resumed_controller_chooses_as_if_nothing_had_happened():
    first = controller()
    first.step_done([[10, 30]])
    first.note_dropped([5, 7])
    second = controller()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for each in (first, second):
        each.step_done([[3, 40], [9, 9]])
    assert first.choose() == second.choose()


def simulate(adaptive, steps=40):
    """As many slots as a step trains samples: twice the prompts do not keep them taken."""
    buffer, engine, scorer, settings = build(n=8, g=4, oversample=2.0, staleness=12, slots=32)
    buffer.schedule.controller = controller(n=8, g=4, s=12, slots=32) if adaptive else None
    stream, stats = prompts(), []
    for step in range(steps):
        stats.append(collect(engine, buffer, stream, scorer, settings, step=step))
        finish_step(buffer)
        buffer.check_conservation()
    busy, offered = (
        sum(f(s) for s in stats[5:]) for f in (lambda s: s.work.slot_seconds(), lambda s: s.offered_slot_s)
    )
    return buffer, 1 - busy / offered


def test_it_keeps_slots_taken_where_a_fixed_ratio_does_not():
    assert heavy_tailed("0/0")  # the lengths of these runs
    fixed, fixed_idle = simulate(False)
    adaptive, adaptive_idle = simulate(True)
    assert fixed_idle > 0.15 and adaptive_idle < fixed_idle / 3
    assert fixed.schedule.max_open == 16 < adaptive.schedule.max_open <= 13 * 8


def test_the_buffer_saves_what_the_controller_saw():
    buffer, _ = simulate(True, steps=8)
    other, *_ = build(n=8, g=4, oversample=2.0, staleness=12, slots=32)
    other.schedule.controller = controller(n=8, g=4, s=12, slots=32)
    state = json.loads(json.dumps(buffer.state_dict()))
    other.load_state_dict(state, list(buffer.groups.values()))
    assert other.schedule.controller.choose() == buffer.schedule.controller.choose()
    del state["controller"]  # of a run whose ratio was fixed so far
    other.schedule.controller = controller(n=8, g=4, s=12, slots=32)
    other.load_state_dict(state, list(buffer.groups.values()))
    assert other.schedule.controller.choose().max_open == 16


@pytest.mark.parametrize("rejected", [0.0, 0.4])
def test_no_deadline_is_missed_and_nothing_is_discarded(rejected):
    count = iter(range(10_000))
    buffer, engine, scorer, settings = build(
        n=4, g=3, staleness=3, slots=24, reject=lambda group: "often" if next(count) % 10 < 10 * rejected else None
    )
    buffer.schedule.controller = controller(n=4, g=3, s=3, slots=24)
    stream = prompts()
    for step in range(30):
        collect(engine, buffer, stream, scorer, settings, step=step)
        for group in finish_step(buffer):
            assert all(step - s.policy_version <= 3 for sample in group.samples for s in sample.segments)
        buffer.check_conservation()
    assert buffer.accounts.tokens_ended["discarded[restart]"] == 0
