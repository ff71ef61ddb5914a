"""Which sample starts next, with what request, and how a step's account describes it; on the simulated engine."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rlpost.engine.protocol import NOTHING, SamplingSettings
from rlpost.errors import RunError
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect, sample_seed
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

PROMPT_TOKENS = 5
SETTINGS = CollectSettings(
    max_in_flight=8,
    max_response_tokens=64,
    sampling=SamplingSettings(),
    seed=11,
    max_filtered_groups=20,
    reject=lambda group: None,
    max_failure_share=0.5,
)


class RecordingEngine(SimulatedEngine):
    def __init__(self, length_of, slots=8):
        super().__init__(
            max_slots=slots,
            length_of=length_of,
            max_response_tokens=64,
            cost=StepCost(base_s=1, sample_s=0, prefill_s=0),
        )
        self.requests = []

    def submit(self, requests):
        self.requests += requests
        return super().submit(requests)


class LateEngine(RecordingEngine):
    """Hands tokens over one step late, as an engine that answers in exchanges may; an abort returns what is left."""

    held = ()

    def step(self):
        result = super().step() if self._running else NOTHING
        late, self.held = self.held, result.deltas
        return replace(result, deltas=late)

    def abort_all(self):
        super().abort_all()
        late, self.held = self.held, ()
        return replace(NOTHING, deltas=late)

    @property
    def num_in_flight(self):
        return len(self._running) + sum(bool(d.finish_reason) for d in self.held)


def prompts():
    token_ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count())


def scorer(reward=lambda response, **_: 1.0):
    return InlineScorer(reward, decode=lambda parts: "x" * sum(map(len, parts)))


def make_buffer(n=2, g=2, oversample=2.0, staleness=2):
    sizes = {"groups_per_step": n, "samples_per_group": g}
    return RolloutBuffer(RolloutStrategy(**sizes, oversample=oversample, max_staleness=staleness))


def spread(request_id):
    return 1 + sample_seed(5, request_id, 0, 0) % 60


@pytest.mark.parametrize("engine_class", [RecordingEngine, LateEngine])
def test_a_request_holds_everything_so_far_and_a_seed_of_its_own(engine_class):
    buffer, engine, stream, judge = make_buffer(), engine_class(spread), prompts(), scorer()
    samples, resumed, replayed = {}, 0, 0
    for step in range(8):
        stats = collect(engine, buffer, stream, judge, SETTINGS, step=step)
        resumed, replayed = resumed + stats.num_resumed, replayed + stats.num_replayed
        samples |= {f"{s.uid}/{s.index}": s for group in buffer.rollout() for s in group.samples}
        buffer.settle()
        buffer.check_conservation()
    requests = [r for r in engine.requests if r.request_id in samples]
    for request in requests:
        tokens = samples[request.request_id].token_ids
        so_far = len(request.token_ids) - PROMPT_TOKENS
        assert request.token_ids.tolist() == [*range(PROMPT_TOKENS), *tokens[:so_far].tolist()]
        assert request.max_new_tokens == 64 - so_far
        uid, index = request.request_id.split("/")
        assert request.seed == sample_seed(11, uid, int(index), so_far)
    for request_id, sample in samples.items():
        assert sample.token_ids.tolist() == list(range(spread(request_id))), "a token is missing or was made twice"
    carried = [r for r in engine.requests if len(r.token_ids) > PROMPT_TOKENS]
    assert resumed == len(carried) > 0 and replayed == sum(len(r.token_ids) for r in carried)


def test_what_an_abort_returns_is_kept_also_where_it_ends_a_sample():
    lengths = {"0/0": 3, "1/0": 4}
    buffer, stream, judge = make_buffer(n=1, g=1, oversample=2.0, staleness=1), prompts(), scorer()
    engine = LateEngine(lambda request_id: lengths.get(request_id, 9), slots=8)
    collect(engine, buffer, stream, judge, SETTINGS, step=0)
    waiting = buffer.groups["1"].samples[0]
    assert (waiting.num_tokens, waiting.finish_reason) == (4, "stop")
    buffer.settle()
    stats = collect(engine, buffer, stream, judge, SETTINGS, step=1)
    assert [g.prompt.uid for g in buffer.admitted] == ["1"] and stats.num_generated == 0


def test_the_next_sample_is_due_first_then_of_the_group_with_the_fewest_left_then_the_oldest():
    buffer, stream = make_buffer(n=4, g=2, staleness=3), prompts()
    buffer.begin_step(1)
    for _ in range(4):
        buffer.add(next(stream))
    groups = list(buffer.groups.values())
    groups[3].oldest_version = 0  # carried over, so due a step before the others
    groups[2].samples[0].state = "scored"  # one of two is left
    buffer.begin_step(1)
    order = [(g.prompt.uid, s.index) for found in iter(lambda: buffer.next_samples(3), []) for g, s in found]
    assert order == [("3", 0), ("3", 1), ("2", 1), ("0", 0), ("0", 1), ("1", 0), ("1", 1)]


def test_ready_groups_are_considered_by_deadline_before_age():
    buffer, stream = make_buffer(n=2, g=1, staleness=2), prompts()
    buffer.begin_step(1)
    for _ in range(3):
        buffer.add(next(stream))
    for group, version in zip(buffer.groups.values(), (1, 0, 1), strict=True):
        group.oldest_version, group.state = version, "ready"
        buffer.schedule._ready[group.uid] = group
    assert [g.prompt.uid for g in buffer.schedule.candidates()] == ["1", "0", "2"]


def test_rule_1_bounds_what_is_drawn_whatever_oversample_says():
    buffer, stream = make_buffer(n=2, g=1, oversample=9.0, staleness=1), prompts()
    buffer.begin_step(0)
    while buffer.may_draw():
        buffer.add(next(stream))
    assert len(buffer.groups) == 4, "(S + 1) N"


def test_the_account_of_a_step_worked_by_hand():
    """One group of one sample is trained a step, two are open. Lengths 3, 10, 50: the second step goes on at 3."""
    lengths = {"0/0": 3, "1/0": 10, "2/0": 50}
    buffer, stream, judge = make_buffer(n=1, g=1, oversample=2.0, staleness=1), prompts(), scorer()
    engine = RecordingEngine(lengths.__getitem__)
    first = collect(engine, buffer, stream, judge, SETTINGS, step=0)
    assert (first.num_launched, first.num_resumed, first.num_replayed, first.num_generated) == (2, 0, 0, 6)
    assert (first.launched_lengths, first.deferred_lengths, first.num_prefill) == ([3, 3], [3], 2 * PROMPT_TOKENS)
    assert first.idle_share == pytest.approx(6 / 8) and first.duration_s == 3
    buffer.settle()
    second = collect(engine, buffer, stream, judge, SETTINGS, step=1)
    assert (second.num_launched, second.num_resumed, second.num_replayed) == (1, 1, PROMPT_TOKENS + 3)
    assert (second.launched_lengths, second.deferred_lengths, second.num_generated) == ([7], [7], 14)


def test_too_many_failed_rewards_stop_the_run_and_the_last_one_is_quoted():
    def reward(response, **_):
        if len(response) % 4:
            raise KeyError("no answer column")
        return 1.0

    buffer = make_buffer(n=2, g=8, oversample=1.0, staleness=0)
    with pytest.raises(RunError, match="share of rewards that failed.*no answer column"):
        collect(RecordingEngine(spread), buffer, prompts(), scorer(reward), SETTINGS, step=0)


def test_rejections_count_in_a_row_only():
    settings = replace(SETTINGS, reject=lambda group: None if int(group.uid) % 3 == 0 else "two of three")
    buffer = make_buffer(n=20, g=1, oversample=1.0, staleness=0)
    stats = collect(RecordingEngine(spread), buffer, prompts(), scorer(), settings, step=0)
    assert stats.rejected["two of three"] > settings.max_filtered_groups and len(buffer.admitted) == 20
