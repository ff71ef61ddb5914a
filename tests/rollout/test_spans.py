"""The stays of samples in the engine, as ``collect`` records them, on the simulated engine."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.rollout.simulation import LIMIT, run

SLOTS = 8


@pytest.fixture(scope="module")
def history():
    return run(6, slots=SLOTS, max_jump=3, reject=lambda group: "odd" if int(group.uid[2:]) % 5 == 4 else None)[1]


def rows(stats):
    spans = stats.spans
    columns = (spans.uid, spans.index, spans.policy_version, spans.start_s, spans.end_s, spans.tokens)
    return list(zip(*columns, spans.kind, spans.end, strict=True))


def test_every_token_is_in_one_stay(history):
    for _, stats in history:
        assert sum(stats.spans.tokens) == stats.num_generated
    tokens, versions = defaultdict(int), defaultdict(list)
    for groups, stats in history:
        for uid, index, version, _, _, num, _, _ in rows(stats):
            tokens[uid, index] += num
            versions[uid, index] += [version] * num
        for group in groups:
            for sample in group.samples:
                assert tokens[group.uid, sample.index] == sample.num_tokens
                assert versions[group.uid, sample.index] == sample.policy_versions.tolist()


def test_stays_fill_the_slots_that_were_paid_for(history):
    for _, stats in history:
        held = sum(end - start for _, _, _, start, end, *_ in rows(stats))
        assert held == pytest.approx(stats.work.slot_seconds(), rel=0.02)
        assert all(stats.started_s <= start <= end <= stats.ended_s for _, _, _, start, end, *_ in rows(stats))


def test_how_stays_begin_and_end(history):
    last = {}
    for _, stats in history:
        kinds = [kind for *_, kind, _ in rows(stats)]
        assert kinds.count("launched") == stats.num_launched
        for uid, index, _, _, _, _, kind, end in rows(stats):
            assert (kind == "resumed") == ((uid, index) in last)
            assert last.get((uid, index), "paused") == "paused", "nothing goes on after its end"
            last[uid, index] = end
    assert set(last.values()) >= {"stop", "paused"} and LIMIT


def test_dropped_groups_are_named(history):
    dropped = [entry for _, stats in history for entry in stats.dropped]
    assert dropped and all(end == "rejected[odd]" and int(uid[2:]) % 5 == 4 for uid, end in dropped)
