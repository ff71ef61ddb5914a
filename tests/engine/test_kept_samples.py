"""Samples that go on with their KV cache: marks, accounts and durability, on the simulated engine."""

import json

import pytest

from rlpost.rollout.collect import collect
from rlpost.rollout.ledger_recovery import recover_ledger, start_ledger
from tests.rollout.simulation import build, finish_step, heavy_tailed, prompts


class Run:
    """A run with a ledger in ``folder``; every token that the simulated engine could hand over is checked."""

    def __init__(self, folder, *, slots=8, **shape):
        self.folder, self.shape = folder, {"slots": slots, "keep_kv": True} | shape
        self.recovery = start_ledger(folder / "ledger.sqlite")
        self._adopt()
        self.stream = prompts()

    def _adopt(self):
        self.buffer, self.engine, self.scorer, self.settings = build(**self.shape, ledger=self.recovery.ledger)

    def step(self, number, **kwargs):
        stats = collect(self.engine, self.buffer, self.stream, self.scorer, self.settings, step=number, **kwargs)
        if stats.stopped:
            self.buffer.store()
            return stats, []
        groups = finish_step(self.buffer)
        self.buffer.check_conservation()
        self.buffer.check_ledger()
        return stats, groups

    def die_and_resume(self, step):
        """As after a checkpoint: another process, whose engine is empty."""
        snapshot = self.folder / f"{step}.sqlite"
        self.recovery.ledger.snapshot(snapshot, step=step)
        state = json.loads(json.dumps(self.buffer.state_dict()))
        self.recovery.ledger.close()
        self.recovery = recover_ledger(self.folder / "ledger.sqlite", snapshot, step=step)
        self._adopt()
        self.buffer.load_state_dict(state, self.recovery.ledger.read_open())
        self.buffer.check_ledger()
        self.stream = prompts(self.buffer.accounts.num_drawn)


def marks(groups):
    return {(g.uid, s.index): [(p.policy_version, p.mixed_kv) for p in s.segments] for g in groups for s in g.samples}


def test_what_is_carried_over_is_never_computed_again_and_its_later_tokens_are_marked(tmp_path):
    run, carried, kept = Run(tmp_path), 0, 0
    for step in range(12):
        stats, groups = run.step(step)
        kept += stats.num_kept
        assert (stats.num_replayed, stats.num_resumed) == (0, 0)
        assert stats.num_prefill == 5 * stats.num_launched, "prompts have five tokens"
        for segments in marks(groups).values():
            assert [mixed for _, mixed in segments] == [False] + [True] * (len(segments) - 1)
            carried += len(segments) > 1
        for group in groups:
            for sample in group.samples:
                assert sample.num_tokens == min(64, heavy_tailed(f"{group.uid}/{sample.index}"))
                assert sample.mixed_kv.sum() == sum(len(p.token_ids) for p in sample.segments[1:])
    assert carried > 5 and kept > 5
    assert "kept" in stats.spans.kind and "resumed" not in stats.spans.kind


def test_keeping_saves_the_replay_and_changes_neither_lengths_nor_the_account(tmp_path):
    kept, replayed = [], []
    for keep_kv, seen in ((True, kept), (False, replayed)):
        (tmp_path / str(keep_kv)).mkdir()
        run = Run(tmp_path / str(keep_kv), keep_kv=keep_kv)
        for step in range(10):
            stats, groups = run.step(step)
            seen.append((stats.num_prefill, {key: len(segments) for key, segments in marks(groups).items()}))
        if not keep_kv:
            assert not any(s.mixed_kv.any() for g in groups for s in g.samples)
            assert run.engine.resume() == []
    assert sum(prefill for prefill, _ in kept) < sum(prefill for prefill, _ in replayed)


def test_after_a_resume_samples_replay_cleanly_and_keep_the_marks_they_had(tmp_path):
    run = Run(tmp_path, slots=24, oversample=4.0)
    for step in range(3):
        run.step(step)
    before = {
        (g.uid, s.index): [(p.policy_version, p.mixed_kv) for p in segments]
        for g in run.buffer.groups.values()
        for s, segments in zip(
            g.samples,
            run.recovery.ledger.read_segments([(g.order, s.index, g.attempt) for s in g.samples]),
            strict=True,
        )
        if segments and not s.finish_reason
    }
    assert any(mixed for parts in before.values() for _, mixed in parts), "nothing was kept before the death"
    run.die_and_resume(3)
    trained = {}
    for step in range(3, 9):
        stats, groups = run.step(step)
        assert (stats.num_kept > 0) == (step > 3) and (stats.num_replayed > 0) == (step == 3)
        trained |= marks(groups)
    seen = {key: parts for key, parts in trained.items() if key in before}
    assert any(any(mixed for _, mixed in before[key]) for key in seen)
    for key, parts in seen.items():
        assert parts[: len(before[key])] == before[key]
        rest = parts[len(before[key]) :]
        assert [(version, version > 3) for version, _ in rest] == rest, "clean in the replay's step, mixed after it"


def test_a_step_that_is_stopped_half_way_keeps_nothing_in_the_engine(tmp_path):
    run = Run(tmp_path)
    run.step(0)
    calls = iter(range(100))
    stats, _ = run.step(1, should_stop=lambda: next(calls) > 1)
    assert stats.stopped and run.engine.num_in_flight == 0 and run.engine.resume() == []
    stats, groups = run.step(1)
    assert len(groups) == 4 and stats.num_replayed > 0


@pytest.mark.parametrize("admission", ["first_complete", "first_begun"])
def test_staleness_holds_though_kept_samples_run_before_what_is_due(tmp_path, admission):
    run = Run(tmp_path, slots=32, oversample=3.0, staleness=2, admission=admission)
    for step in range(20):
        _, groups = run.step(step)
        assert len(groups) == 4
        assert all(step - p.policy_version <= 2 for g in groups for s in g.samples for p in s.segments)


def test_samples_that_the_engine_ended_between_two_steps_replay_and_are_clean_again(tmp_path):
    """As an evaluation does. They had gone on with old keys and values before."""
    run, kinds, ends = Run(tmp_path, slots=24, oversample=4.0), {}, set()
    for step in range(40):
        if step % 5 == 0:
            run.engine.abort_all()
        stats, groups = run.step(step)
        spans = stats.spans
        kinds |= dict(zip(zip(spans.uid, spans.index, spans.policy_version, strict=True), spans.kind, strict=True))
        for (uid, index), segments in marks(groups).items():
            stays = [kinds[uid, index, version] for version, _ in segments]
            assert [mixed for _, mixed in segments] == [kind == "kept" for kind in stays]
            ends.add(tuple(stays))
    assert any("kept" in stays and "resumed" in stays[stays.index("kept") :] for stays in ends), ends
