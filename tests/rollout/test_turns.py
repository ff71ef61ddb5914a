"""A turn's end is not a sample's end: what is observed between turns is kept and counted, and not trained on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from rlpost.algos.batch import build_batches
from rlpost.engine.protocol import SamplingSettings
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.rollout.turns import Observation
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

OBSERVED = np.array([901, 902], np.int32)
LIMIT = 40
STRATEGY = RolloutStrategy(groups_per_step=2, samples_per_group=2, oversample=2.0, max_staleness=2)


class Recording(SimulatedEngine):
    """Ends a turn after ``length_of`` tokens of it, however much the sample held before."""

    def __init__(self, length_of, slots=3):
        self.turns = {}
        cost = StepCost(base_s=1, sample_s=0, prefill_s=0)
        super().__init__(max_slots=slots, length_of=self.end_of, max_response_tokens=LIMIT, cost=cost)
        self.requests = []
        self.turn_length = length_of

    def end_of(self, request_id):
        return self.turns[request_id]

    def submit(self, requests):
        for request in requests:
            held = request.num_tokens - 3  # response tokens so far: the prompt has three
            started = self.turns.get(request.request_id)
            if started is None or held >= started:  # a new turn, not one that was interrupted
                self.turns[request.request_id] = held + self.turn_length(request.request_id)
            self.requests.append((request.request_id, request.token_ids.tolist(), request.max_new_tokens, request.seed))
        return super().submit(requests)


def settings(turns):
    def after_turn(prompt, segments):
        done = sum(not segment.trainable for segment in segments)
        return Observation(OBSERVED) if done < turns - 1 else None

    return CollectSettings(
        max_in_flight=3,
        max_response_tokens=LIMIT,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=9,
        reject=lambda group: None,
        after_turn=after_turn,
    )


def prompts():
    token_ids = np.arange(3, dtype=np.int32)
    return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count())


def scorer(seen):
    def reward(response, **_):
        seen.append(response)
        return float(len(seen) % 3)

    return InlineScorer(reward, decode=lambda parts: "".join("o" if (p >= 900).all() else "m" for p in parts))


def length_of(request_id):
    return 2 + int(request_id.replace("/", "")) % 5


def play(tmp_path, *, turns=3, steps=4):
    seen, trained = [], []
    ledger = Ledger(tmp_path / "ledger.sqlite")
    buffer, engine, stream = RolloutBuffer(STRATEGY, ledger=ledger), Recording(length_of), prompts()
    judge, all_stats = scorer(seen), []
    for step in range(steps):
        all_stats.append(collect(engine, buffer, stream, judge, settings(turns), step=step))
        trained += buffer.rollout()
        buffer.store()
        buffer.settle()
        buffer.check_conservation()
        buffer.check_ledger()
    return buffer, engine, trained, all_stats, seen


def test_observations_stand_between_the_turns_and_are_not_trained_on(tmp_path):
    buffer, engine, trained, all_stats, seen = play(tmp_path)
    assert len(trained) == 8 and all(set(response) == {"m", "o"} for response in seen)
    for group in trained:
        for sample in group.samples:
            observed = [s for s in sample.segments if not s.trainable]
            assert [s.token_ids.tolist() for s in observed] == [[901, 902]] * 2
            assert all(not s.rollout_logprobs.any() for s in observed)
            assert sample.segments[0].trainable and sample.segments[-1].trainable and sample.finish_reason == "stop"
    (batch,) = build_batches(trained, policy_version=9, max_row_tokens=4096)
    (row,) = batch.rows
    assert not row.loss_mask[np.isin(row.token_ids, OBSERVED)].any() and batch.num_tokens == row.loss_mask.sum()
    assert batch.num_tokens == sum(s.num_tokens - 2 * 2 for g in trained for s in g.samples)
    received = sum(s.num_generated + s.num_observed for s in all_stats)
    assert received == buffer.accounts.tokens_received, "a token was counted twice or not at all"
    assert sum(s.num_observed for s in all_stats) >= 8 * 2 * 2 * 2


def test_the_next_turn_reads_everything_before_it_with_a_seed_of_its_own(tmp_path):
    _, engine, trained, *_ = play(tmp_path)
    of_sample = [r for r in engine.requests if r[0] == "0/0"]
    whole = [*range(3), *trained[0].samples[0].token_ids.tolist()]
    assert len(of_sample) >= 3 and len({seed for *_, seed in of_sample}) == len(of_sample)
    for _, token_ids, max_new_tokens, _ in of_sample:
        assert token_ids == whole[: len(token_ids)] and max_new_tokens == LIMIT - (len(token_ids) - 3)
    assert any(token_ids[-2:] == OBSERVED.tolist() for _, token_ids, *_ in of_sample)


def test_an_episode_that_is_carried_over_is_whole_in_the_ledger(tmp_path):
    buffer, *_ = play(tmp_path, steps=2)
    open_samples = [(g, s) for g in buffer.groups.values() for s in g.samples if s.evicted and s.num_tokens]
    assert open_samples, "nothing was carried over"
    buffer.load_tokens(*zip(*open_samples, strict=True))
    for _, sample in open_samples:
        tokens = np.concatenate([s.token_ids for s in sample.segments])
        assert len(tokens) == sample.num_tokens
        for segment in sample.segments:
            assert segment.trainable == (not np.isin(segment.token_ids, OBSERVED).any())


def test_an_observation_for_which_there_is_no_room_ends_the_sample(tmp_path):
    buffer, engine, stream = RolloutBuffer(replace(STRATEGY, oversample=1.0)), Recording(lambda r: 39), prompts()
    collect(engine, buffer, stream, scorer([]), settings(2), step=0)
    for group in buffer.rollout():
        for sample in group.samples:
            assert (sample.num_tokens, sample.finish_reason, len(sample.segments)) == (39, "length", 1)
    buffer.settle()
    buffer.check_conservation()
