"""What each benchmarked strategy does on lengths small enough to follow by hand, and how it is accounted for."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rlpost.bench.engines import ForcedLengths
from rlpost.bench.published import run_published
from rlpost.engine.protocol import SamplingSettings
from rlpost.rollout.collect import CollectSettings
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.account import StepAccount, measure
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.simulation.strategies import Workload, run_collect, run_saturated
from rlpost.types import Prompt

CAP, PROMPT_TOKENS = 64, 4
COST = StepCost(base_s=1.0, sample_s=0.0, prefill_s=0.0)


def engine(lengths, slots):
    return SimulatedEngine(
        max_slots=slots, length_of=lambda request_id: lengths[request_id], max_response_tokens=CAP, cost=COST
    )


def strategy(**numbers):
    return RolloutStrategy(groups_per_step=1, samples_per_group=1, **numbers)


def workload(*, n, g, slots):
    settings = CollectSettings(
        max_in_flight=slots,
        max_response_tokens=CAP,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=1,
        reject=lambda group: None,
    )
    token_ids = np.zeros(PROMPT_TOKENS, np.int32)

    def prompts():
        return (Prompt(uid=str(i), token_ids=token_ids, text="") for i in itertools.count())

    return Workload(groups_per_step=n, samples_per_group=g, settings=settings, prompts=prompts, publish=lambda: None)


def test_the_published_scheduler_drops_surplus_and_resumes_what_it_aborted():
    lengths = {f"{n}/{i}": 9 for n in range(8) for i in range(2)}
    lengths |= {"0/0": 3, "0/1": 3, "1/0": 3, "1/1": 3, "2/0": 3, "2/1": 3}
    load = workload(n=2, g=2, slots=8)
    first, second = run_published(engine(lengths, 8), load, oversample=2.0, hold="sample", num_steps=2)
    # Four groups start together; three are complete after 3 tokens, of which one is dropped; the fourth is aborted.
    assert (first.trained, first.discarded, first.held, first.generated) == (12, 6, 6, 24)
    assert first.duration_s == 3.0 and (first.carried, first.replayed) == (0, 0)
    # It goes on with 6 of 9 tokens left, beside three new groups of 9: it and the oldest of them train.
    assert second.replayed == 2 * (PROMPT_TOKENS + 3)
    assert (second.trained, second.carried, second.discarded) == (36, 6, 36)
    assert sorted(second.spans) == [1, 1, 2, 2] and second.staleness == 1


def test_a_group_that_holds_its_slots_keeps_others_waiting():
    lengths = {"0/0": 2, "0/1": 8, "1/0": 2, "1/1": 2}
    load = workload(n=2, g=2, slots=2)
    (by_sample,) = run_published(engine(lengths, 2), load, oversample=1.0, hold="sample", num_steps=1)
    (by_group,) = run_published(engine(lengths, 2), load, oversample=1.0, hold="group", num_steps=1)
    assert by_sample.duration_s == 8.0 and by_sample.busy_slot_s == 14.0
    assert by_group.duration_s == 10.0 and by_group.busy_slot_s == 14.0


def test_collect_is_accounted_for_with_what_was_carried():
    lengths = {"0/0": 9, "1/0": 3, "2/0": 9, "3/0": 9, "4/0": 9}
    ours = strategy(oversample=2.0, max_staleness=2)
    accounts = list(run_collect(engine(lengths, 2), workload(n=1, g=1, slots=2), ours, num_steps=2))
    assert [(a.trained, a.carried, a.held, a.generated) for a in accounts] == [(3, 0, 3, 6), (9, 3, 6, 12)]
    assert accounts[1].replayed == PROMPT_TOKENS + 3 and accounts[1].spans == (2,) and accounts[1].staleness == 1


def test_a_window_is_trained_minus_carried_in_plus_carried_out():
    step = StepAccount(
        trained=10,
        carried=4,
        held=5,
        generated=15,
        discarded=0,
        replayed=8,
        prefilled=8,
        duration_s=2.0,
        busy_slot_s=3.0,
        offered_slot_s=4.0,
        spans=(1, 2),
        staleness=1,
    )
    later = replace(step, held=7, generated=14, discarded=2, staleness=3, spans=(3,))
    figures = measure([step, later], warm_up=1)
    assert figures.consumed_tokens_per_s == (10 - 5 + 7) / 2.0
    assert (figures.idle_share, figures.carried_share, figures.staleness_max) == (0.25, 0.4, 3)
    with pytest.raises(AssertionError, match="12 tokens consumed, but 11 generated"):
        measure([step, replace(later, generated=13)], warm_up=1)


def test_saturated_slots_are_always_full():
    lengths = {f"{n}/{i}": 1 + (7 * n + 3 * i) % 20 for n in range(500) for i in range(2)}
    accounts = run_saturated(engine(lengths, 4), workload(n=3, g=2, slots=4), warm_up=2, num_steps=10)
    figures = measure(accounts, warm_up=1)
    assert figures.idle_share == 0 and figures.replayed_tokens == 0
    assert figures.consumed_tokens_per_s == 4.0, "four slots, a token a second each"
    assert sum(a.duration_s for a in accounts) == sum(len(a.work.step_s) and sum(a.work.step_s) for a in accounts)


def test_a_forced_length_is_an_ordinary_request():
    class Recording:
        submitted = ()

        def submit(self, requests):
            self.submitted = requests
            return [0] * len(requests)

    inner = Recording()
    forced = ForcedLengths(inner, cap=CAP, length_of=lambda request_id: 10)
    seen = []

    class Probe(SimulatedEngine):
        def submit(self, requests):
            seen.extend(requests)
            return super().submit(requests)

    probe = Probe(max_slots=2, length_of=lambda request_id: 10, max_response_tokens=CAP, cost=COST)
    list(run_collect(probe, workload(n=1, g=1, slots=2), strategy(), num_steps=1))
    fresh = seen[0]._replace(sampling=SamplingSettings(stop_token_ids=(7,)))
    forced.submit([fresh, fresh._replace(request_id="resumed", max_new_tokens=CAP - 4)])
    assert [r.max_new_tokens for r in inner.submitted] == [10, 6]
    assert all(r.sampling.stop_token_ids == () for r in inner.submitted)
    assert inner.submitted[0].token_ids is fresh.token_ids
