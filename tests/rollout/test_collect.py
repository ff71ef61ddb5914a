"""``collect`` on the simulated engine: scheduling, conservation, staleness, and synchronous as a special case."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.config import RewardConfig
from rlpost.errors import RunError
from rlpost.rewards.functions import load_functions
from rlpost.rollout.buffer import LedgerError, RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect, sample_seed
from rlpost.rollout.engine import SamplingSettings
from rlpost.rollout.reward_workers import InlineCalls
from rlpost.rollout.scoring import InlineScorer, RewardScorer, Verdict, read_outcome
from rlpost.rollout.simulated_engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

LIMIT = 64
COST = StepCost(base_s=1.0, sample_s=0.01, prefill_s=0.001)


def prompts(start=0):
    return (Prompt(uid=f"0:{i}", token_ids=np.arange(5, dtype=np.int32), text=f"p{i}") for i in itertools.count(start))


def heavy_tailed(request_id):
    seed = sample_seed(7, request_id, 0, 0)
    return max(1, int(np.exp(np.random.default_rng(seed % 2**32).normal(2.0, 1.0))))


def build(
    *, n=4, g=3, oversample=2.0, staleness=3, slots=8, length_of=heavy_tailed, reward=None, reject=None, max_jump=None
):
    buffer = RolloutBuffer(groups_per_step=n, samples_per_group=g, oversample=oversample, max_staleness=staleness)
    engine = SimulatedEngine(
        max_slots=slots, length_of=length_of, max_response_tokens=LIMIT, cost=COST, max_jump=max_jump
    )
    scorer = InlineScorer(reward or (lambda response, **_: len(response) % 3), decode=lambda ids: "x" * len(ids))
    settings_ = CollectSettings(
        max_in_flight=slots,
        max_response_tokens=LIMIT,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=20,
        reject=reject or (lambda group: None),
    )
    return buffer, engine, scorer, settings_


def run(steps, **kwargs):
    buffer, engine, scorer, settings_ = build(**kwargs)
    stream = prompts()
    history = []
    most_open = 0

    def count_open(admitted, running, open_groups):
        nonlocal most_open
        most_open = max(most_open, admitted + open_groups)

    for step in range(steps):
        stats = collect(engine, buffer, stream, scorer, settings_, step=step, on_progress=count_open)
        assert most_open <= buffer.max_open, "more groups were open or admitted than oversample allows"
        buffer.check_conservation()
        history.append((buffer.settle(), stats))
        buffer.check_conservation()
    return buffer, history


def test_synchronous_carries_nothing_over():
    buffer, history = run(4, oversample=1.0, staleness=0)
    assert not buffer.groups and buffer.num_drawn == 16
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
    assert buffer.tokens_received == sum(stats.num_generated for _, stats in history)


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
    assert history[1][1].num_generated == 0 and history[1][1].work.step_s == []


def test_rejected_groups_make_room_and_are_counted():
    rejected = []

    def reject(group):
        if int(group.uid.split(":")[1]) % 2:
            rejected.append(group.uid)
            return "odd"
        return None

    buffer, history = run(3, oversample=1.0, staleness=0, reject=reject)
    assert buffer.groups_ended["rejected[odd]"] == len(rejected) > 0
    assert buffer.groups_ended["trained"] == 12
    assert buffer.tokens_ended["rejected[odd]"] > 0


def test_a_filter_that_rejects_everything_ends_with_a_message():
    with pytest.raises(RunError, match="dropped in a row.*max_filtered_groups=20"):
        run(1, reject=lambda group: "never")


def test_a_raising_reward_is_a_counted_failure_and_the_sample_leaves_its_group():
    def reward(response, *, prompt, **_):
        if len(response) % 5 == 0:
            raise ZeroDivisionError("bad luck")
        return 1.0

    buffer, history = run(8, reward=reward)
    assert buffer.tokens_ended["trained"] == sum(s.num_tokens for gs, _ in history for g in gs for s in g.scored)
    assert buffer.tokens_ended["failed[reward]"] > 0
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
    buffer.settle({g.prompt.uid: "nan_update" for g in buffer.admitted})
    buffer.check_conservation()
    assert buffer.groups_ended == {"failed[nan_update]": 4} and buffer.tokens_ended["failed[nan_update]"] == tokens


def test_the_ledger_notices_a_lost_token_and_a_lost_group():
    buffer, engine, scorer, settings_ = build()
    collect(engine, buffer, prompts(), scorer, settings_, step=0)
    buffer.tokens_received += 1
    with pytest.raises(LedgerError, match="tokens received"):
        buffer.check_conservation()
    buffer.tokens_received -= 1
    buffer.admitted.pop()
    with pytest.raises(LedgerError, match="groups drawn"):
        buffer.check_conservation()


def test_state_survives_json_and_the_next_steps_are_the_same():
    import json

    def finish(buffer, engine, scorer, settings_, stream):
        out = []
        for step in range(3, 6):
            collect(engine, buffer, stream, scorer, settings_, step=step)
            out.append([(g.uid, [s.token_ids.tolist() for s in g.samples]) for g in buffer.settle()])
        return out

    buffer, engine, scorer, settings_ = build()
    stream = prompts()
    for step in range(3):
        collect(engine, buffer, stream, scorer, settings_, step=step)
        buffer.settle()
    state = json.loads(json.dumps(buffer.state_dict()))
    drawn = buffer.num_drawn
    other, engine2, scorer2, _ = build()
    other.load_state_dict(state)
    assert finish(other, engine2, scorer2, settings_, prompts(drawn)) == finish(
        buffer, engine, scorer, settings_, stream
    )


@pytest.mark.parametrize("change", [{"n": 3}, {"staleness": 2}, {"g": 5}])
def test_a_resume_that_could_miss_deadlines_is_refused(change):
    buffer, engine, scorer, settings_ = build()
    collect(engine, buffer, prompts(), scorer, settings_, step=0)
    buffer.settle()
    with pytest.raises(RunError, match="resuming: rollout.*as it was"):
        build(**change)[0].load_state_dict(buffer.state_dict())
    build(n=5, staleness=4)[0].load_state_dict(buffer.state_dict())


def test_a_verdict_pending_at_the_stop_is_asked_for_again_after_a_resume():
    class Slow(InlineScorer):
        """Never gives the verdicts of the second group."""

        def poll(self):
            given = [v for v in self._verdicts if v.uid == "0:0"]
            self._verdicts = [v for v in self._verdicts if v.uid != "0:0"]
            return given

    shape = {"n": 1, "g": 2, "oversample": 2.0, "staleness": 1, "slots": 4, "length_of": lambda request_id: 3}
    buffer, engine, _, settings_ = build(**shape)
    slow = Slow(lambda response, **_: 1.0, decode=lambda ids: "")
    collect(engine, buffer, prompts(), slow, settings_, step=0)
    buffer.settle()
    assert buffer.states() == {"scoring": 1} and slow.num_pending == 2
    other, engine2, scorer2, _ = build(**shape)
    other.load_state_dict(buffer.state_dict())
    stats = collect(engine2, other, prompts(10), scorer2, settings_, step=1)
    assert [g.uid for g in other.settle()] == ["0:1"] and stats.num_generated == 0


def rank_lengths(responses, **_):
    assert len(responses) == 3, "a group function was called with a part of a group"
    return [float(len(r) == max(map(len, responses))) for r in responses]


def group_scorer():
    calls = InlineCalls(load_functions(RewardConfig(function=rank_lengths, workers=0)))
    return RewardScorer(calls, lambda ids: "x" * len(ids), group_size=3)


def test_a_group_function_judges_whole_groups_over_steps_and_after_a_resume():
    """Finished samples of groups that are not whole wait in the scorer; a resume hands them to a new one."""
    buffer, engine, _, settings_ = build()
    scorer, stream, trained, handed_over = group_scorer(), prompts(), [], 0
    for step in range(9):
        if step in (3, 6):
            handed_over += scorer.num_pending
            state = json.loads(json.dumps(buffer.state_dict()))
            drawn = buffer.num_drawn
            buffer, engine, _, _ = build()
            buffer.load_state_dict(state)
            scorer, stream = group_scorer(), prompts(drawn)
        collect(engine, buffer, stream, scorer, settings_, step=step)
        buffer.check_conservation()
        trained += buffer.settle()
    assert handed_over > 0, "no group was cut in two by a resume, so nothing was tried"
    assert len(trained) == 36 and len({group.uid for group in trained}) == 36
    for group in trained:
        longest = max(s.num_tokens for s in group.samples)
        assert [s.reward for s in group.samples] == [float(s.num_tokens == longest) for s in group.samples]


def test_seeds_differ_by_everything_that_matters_and_repeat():
    base = sample_seed(0, "0:1", 2, 0)
    assert base == sample_seed(0, "0:1", 2, 0) and 0 <= base < 2**63
    others = [
        sample_seed(1, "0:1", 2, 0),
        sample_seed(0, "0:2", 2, 0),
        sample_seed(0, "0:1", 3, 0),
        sample_seed(0, "0:1", 2, 9),
    ]
    assert len({base, *others}) == 5


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


def test_a_verdict_has_a_reward_or_a_failure():
    assert Verdict(uid="0:0", index=0, reward=None, failure="timeout: 5 s").failure
