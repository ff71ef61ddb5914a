"""``collect`` on the simulated engine: scheduling, conservation, staleness, and synchronous as a special case."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.errors import RunError
from rlpost.rewards.scoring import read_outcome
from rlpost.rollout.accounts import LedgerError
from rlpost.rollout.collect import collect, sample_seed
from tests.rollout.simulation import LIMIT, build, finish_step, heavy_tailed, prompts, run


def test_synchronous_carries_nothing_over():
    buffer, history = run(4, oversample=1.0, staleness=0)
    assert not buffer.groups and buffer.accounts.num_drawn == 16
    for step, (groups, stats) in enumerate(history):
        assert len(groups) == 4 and stats.num_resumed == 0
        assert {v for g in groups for s in g.samples for v in s.policy_versions.tolist()} == {step}


def test_april_carries_over_and_keeps_every_token():
    buffer, history = run(10)
    assert any(stats.num_resumed for _, stats in history)
    for groups, _ in history:
        for sample in (s for g in groups for s in g.samples):
            length = min(heavy_tailed(f"{sample.uid}/{sample.index}"), LIMIT)
            assert sample.num_tokens == length == len(sample.rollout_logprobs)
            assert sample.token_ids.tolist() == (np.arange(length) % 64).tolist()  # no gap, no repeat at a resume
            assert np.all(np.diff(sample.policy_versions) >= 0)
    spans = [s.version_span for groups, _ in history for g in groups for s in g.samples]
    assert max(spans) > 1
    assert buffer.accounts.tokens_received == sum(stats.num_generated for _, stats in history)


def test_april_is_faster_than_synchronous_per_trained_group():
    def time_of(**kwargs):
        return sum(stats.duration_s for _, stats in run(12, n=8, g=4, slots=32, **kwargs)[1])

    assert time_of(oversample=2.0, staleness=3) < 0.8 * time_of(oversample=1.0, staleness=0)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    g=st.integers(1, 4),
    staleness=st.integers(0, 3),
    share=st.floats(0, 1),
    slots=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_staleness_and_conservation_hold_for_any_shape(n, g, staleness, share, slots, seed):
    def length_of(request_id):
        return 1 + sample_seed(seed, request_id, 0, 0) % 40

    buffer, history = run(
        6, n=n, g=g, oversample=1 + share * staleness, staleness=staleness, slots=slots, length_of=length_of
    )
    for step, (groups, stats) in enumerate(history):
        assert len(groups) == n
        assert all(step - s.oldest_version <= staleness for group in groups for s in group.samples)
        assert stats.num_generated == 0 or max(stats.work.running) <= slots
    uids = [group.uid for groups, _ in history for group in groups]
    assert len(set(uids)) == len(uids), "a group was trained twice"


def test_slots_are_refilled_one_for_one():
    _, history = run(6, n=8, g=4, slots=16, oversample=3.0, staleness=2)
    for _, stats in history:
        running = stats.work.running
        assert all(r == 16 for r in running[:-1]), "a slot stood empty while samples were waiting"


def test_due_groups_start_before_new_ones():
    lengths = {"0:0/0": 50}
    buffer, history = run(3, n=2, g=1, slots=2, oversample=2.0, staleness=2, length_of=lambda rid: lengths.get(rid, 2))
    trained_at = {group.uid: step for step, (groups, _) in enumerate(history) for group in groups}
    assert trained_at["0:0"] <= 2 and history[trained_at["0:0"]][0]


def test_surplus_complete_groups_train_first_in_the_next_step():
    # 4 groups of equal length finish in the same engine step; 2 are wanted.
    buffer, history = run(2, n=2, g=1, slots=4, oversample=2.0, staleness=1, length_of=lambda rid: 3)
    assert [g.uid for g in history[0][0]] == ["0:0", "0:1"]
    assert [g.uid for g in history[1][0]] == ["0:2", "0:3"]
    assert history[1][1].num_generated == 0 and not history[1][1].work.step_s


def test_rejected_groups_make_room_and_are_counted():
    rejected = []

    def reject(group):
        if int(group.uid.split(":")[1]) % 2:
            rejected.append(group.uid)
            return "odd"
        return None

    buffer, history = run(3, oversample=1.0, staleness=0, reject=reject)
    assert buffer.accounts.groups_ended["rejected[odd]"] == len(rejected) > 0
    assert buffer.accounts.groups_ended["trained"] == 12
    assert buffer.accounts.tokens_ended["rejected[odd]"] > 0


def test_a_filter_that_rejects_everything_ends_with_a_message():
    with pytest.raises(RunError, match="dropped in a row.*max_filtered_groups=20"):
        run(1, reject=lambda group: "never")


def test_a_raising_reward_is_a_counted_failure_and_the_sample_leaves_its_group():
    def reward(response, *, prompt, **_):
        if len(response) % 5 == 0:
            raise ZeroDivisionError("bad luck")
        return 1.0

    buffer, history = run(8, reward=reward)
    assert buffer.accounts.tokens_ended["trained"] == sum(
        s.num_tokens for gs, _ in history for g in gs for s in g.scored
    )
    assert buffer.accounts.tokens_ended["failed[reward]"] > 0
    failed = [s for groups, _ in history for g in groups for s in g.samples if s.failure]
    assert failed and all(s.reward is None and s.failure.startswith("reward_error: ZeroDivisionError") for s in failed)
    assert sum(stats.failures.get("reward_error", 0) for _, stats in history) >= len(failed)
    assert all(len(g.scored) >= 2 for groups, _ in history for g in groups)


def test_a_reward_that_always_raises_stops_the_run():
    def reward(response, **_):
        raise OSError("no judge today")

    with pytest.raises(RunError, match="no judge today"):
        run(1, reward=reward)


def test_a_reward_that_mostly_raises_stops_the_run_within_a_step_of_samples():
    """Every group is dropped, so the step's end would never come: 20 groups in a row are 60 calls here."""
    calls = itertools.count(1)

    def failing(response, **_):
        if next(calls) % 3:
            raise ValueError("no judge today")
        return 1.0

    buffer, engine, scorer, settings_ = build(n=4, g=3, reward=failing)
    with pytest.raises(RunError, match=r"share of rewards that failed.*no judge today"):
        collect(engine, buffer, prompts(), scorer, replace(settings_, max_failure_share=0.5), step=0)
    assert 4 * 3 <= next(calls) - 1 <= 4 * 3 + 8, "it stops as soon as a step's worth of samples was judged"


def test_a_skipped_update_becomes_failed_groups():
    buffer, engine, scorer, settings_ = build()
    collect(engine, buffer, prompts(), scorer, settings_, step=0)
    tokens = sum(g.freeze().num_tokens for g in buffer.admitted)
    finish_step(buffer, {g.uid: "nan_update" for g in buffer.admitted})
    buffer.check_conservation()
    assert (
        buffer.accounts.groups_ended == {"failed[nan_update]": 4}
        and buffer.accounts.tokens_ended["failed[nan_update]"] == tokens
    )


def test_the_ledger_notices_a_lost_token_and_a_lost_group():
    buffer, engine, scorer, settings_ = build()
    collect(engine, buffer, prompts(), scorer, settings_, step=0)
    buffer.accounts.tokens_received += 1
    with pytest.raises(LedgerError, match="tokens received"):
        buffer.check_conservation()
    buffer.accounts.tokens_received -= 1
    waiting = next(g for g in buffer.groups.values() if g.oldest_version == 0)
    waiting.oldest_version = -3
    with pytest.raises(LedgerError, match="past their staleness deadline"):
        buffer.check_conservation()
    waiting.oldest_version = None
    with pytest.raises(LedgerError, match="miscounted"):
        buffer.check_conservation()
    waiting.oldest_version = 0
    buffer.check_conservation()
    buffer.admitted.pop()
    with pytest.raises(LedgerError, match="groups drawn"):
        buffer.check_conservation()


def test_restarting_what_grew_too_old_counts_its_tokens_and_selects_against_long_answers():
    """First come, first trained: the long sample is overtaken until it is too old, restarted, and overtaken again."""
    lengths = {"0:0/0": 60}
    shape = dict(n=1, g=1, slots=2, oversample=2.0, staleness=1, length_of=lambda rid: lengths.get(rid, 7))
    buffer, history = run(12, **shape, restart_stale=True)
    trained = [group.uid for groups, _ in history for group in groups]
    assert "0:0" not in trained and buffer.groups["0:0"].attempt > 1
    assert buffer.accounts.tokens_ended["discarded[restart]"] > 60
    for step, (groups, _) in enumerate(history):
        assert all(step - s.oldest_version <= 1 for group in groups for s in group.samples)
    seeds = restarted_seeds(**shape)
    assert len(seeds) > 1 and len(set(seeds)) == len(seeds), "another attempt draws other numbers"
    scheduled, kept = run(12, **shape)
    assert any(group.uid == "0:0" for groups, _ in kept for group in groups[:1])
    assert scheduled.accounts.tokens_ended["discarded[restart]"] == 0


def test_a_complete_group_that_waited_too_long_is_restarted_with_nothing_of_before():
    """Many more groups are open than train, so some are complete, wait, and grow too old."""
    buffer, engine, scorer, settings_ = build(n=2, g=2, slots=8, oversample=4.0, staleness=1, restart_stale=True)
    stream, num_restarted = prompts(), 0
    for step in range(60):
        collect(engine, buffer, stream, scorer, settings_, step=step)
        num_restarted += sum(group.attempt > 0 for group in buffer.admitted)
        for group in finish_step(buffer):
            assert all(step - s.policy_version <= 1 for sample in group.samples for s in sample.segments)
    assert num_restarted > 5


def restarted_seeds(**shape):
    """The seeds with which sample 0:0/0 was started from its prompt."""
    buffer, engine, scorer, settings_ = build(**shape, restart_stale=True)
    seeds, submit = [], engine.submit

    def record(requests):
        seeds.extend(r.seed for r in requests if r.request_id == "0:0/0" and len(r.token_ids) == 5)
        return submit(requests)

    engine.submit = record
    stream = prompts()
    for step in range(12):
        collect(engine, buffer, stream, scorer, settings_, step=step)
        finish_step(buffer)
    return seeds


def test_seeds_differ_by_everything_that_matters_and_repeat():
    base = sample_seed(0, "0:1", 2, 0)
    assert base == sample_seed(0, "0:1", 2, 0) and 0 <= base < 2**63
    others = [
        sample_seed(1, "0:1", 2, 0),
        sample_seed(0, "0:2", 2, 0),
        sample_seed(0, "0:1", 3, 0),
        sample_seed(0, "0:1", 2, 9),
        sample_seed(0, "0:1", 2, 0, attempt=1),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    "outcome, expected",
    [
        (1, (1.0, {})),
        (True, (1.0, {})),
        ({"a": 1, "b": 0.5}, (1.5, {"a": 1.0, "b": 0.5})),
        ({"reward": 2, "a": 1}, (2.0, {"a": 1.0})),
    ],
)
def test_outcomes(outcome, expected):
    assert read_outcome(outcome) == expected


@pytest.mark.parametrize("outcome", [None, "1", float("nan"), {"reward": float("inf"), "a": 0}, [], {}])
def test_outcomes_that_are_not_rewards_raise(outcome):
    with pytest.raises(ValueError):
        read_outcome(outcome)
