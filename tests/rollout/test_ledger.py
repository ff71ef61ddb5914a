"""The ledger: what is written comes back bit for bit and rolls back exactly."""

import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.config import RewardConfig
from rlpost.rewards.functions import load_functions
from rlpost.rewards.scoring import InlineScorer, RewardScorer
from rlpost.rewards.worker_pool import InlineCalls
from rlpost.rollout.accounts import ROLLED_BACK
from rlpost.rollout.collect import collect, sample_seed
from rlpost.rollout.ledger import TABLES, Ledger
from tests.rollout.ledger_life import SHAPE, Life, identity, reward_with_failures, uninterrupted
from tests.rollout.simulation import build, finish_step, prompts


def test_with_a_ledger_the_same_groups_are_trained_and_the_tokens_leave_memory(tmp_path):
    life = Life(tmp_path).begin()
    buffer, engine, scorer, settings_ = build(**SHAPE)
    stream = prompts()
    for step in range(6):
        collect(engine, buffer, stream, scorer, settings_, step=step)
        assert identity(life.step(step)) == identity(finish_step(buffer))
        held = [s for g in life.buffer.groups.values() for s in g.samples]
        assert any(s.evicted for s in held) and not any(s.segments or s.chunks for s in held)
        life.buffer.check_ledger()


@settings(max_examples=25, deadline=None)
@given(
    kills=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=4), lost=st.booleans(), old=st.booleans()
)
def test_any_number_of_kills_changes_nothing(tmp_path_factory, kills, lost, old):
    """Each kill (after ``saved`` steps and ``more`` unsaved ones) goes back to the checkpoint; the groups trained are
    those of a run that was never interrupted. ``lost``: the live ledger is gone each time, only the copy is left.
    ``old``: in a setting where groups grow too old and are restarted."""
    shape = {"reward": reward_with_failures, "reject": lambda group: "odd" if int(group.uid[2:]) % 5 == 1 else None}
    shape |= dict(restart_stale=True, staleness=1, slots=3, oversample=4.0) if old else {}
    steps = 9
    expected = uninterrupted(tmp_path_factory.mktemp("whole"), steps, **shape)
    folder = tmp_path_factory.mktemp("killed")
    life, trained, at = Life(folder, **shape).begin(), {}, 0
    for saved, more in [*kills, (steps, 0)]:
        while at < min(saved, steps):
            trained[at] = (identity(life.step(at)), life.account)
            at += 1
        if at == 0:
            continue
        life.save(at)
        for step in range(at, min(at + more, steps)):
            life.step(step)
        life.close()
        if lost:
            (folder / "ledger.sqlite").unlink()
        life = Life(folder, **shape).resume(at)
        undone = life.recovery.tokens_undone
        assert (more == 0 or at == steps or lost) == (undone == 0), "what a rollback discards is counted"
        life.buffer.check_conservation()
    assert [trained[step] for step in range(steps)] == expected
    life.close()


def test_a_rollback_leaves_the_rows_of_earlier_steps_as_they_were(tmp_path):
    life = Life(tmp_path).begin()

    def rows():
        ledger = life.recovery.ledger
        tables = [table for table in TABLES if table != "rollbacks"]
        return {table: sorted(ledger.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}

    for step in range(3):
        life.step(step)
    before = rows()
    for step in range(3, 6):
        life.step(step)
    assert rows() != before
    groups, tokens = life.recovery.ledger.roll_back(3)
    assert rows() == before and groups > 0 and tokens > 0
    assert life.recovery.ledger.rolled_back() == tokens


def test_tokens_undone_by_several_rollbacks_add_up_and_balance(tmp_path):
    life = Life(tmp_path).begin()
    for step in range(2):
        life.step(step)
    life.save(2)
    undone = 0
    for more in (3, 1, 2):
        for step in range(2, 2 + more):
            life.step(step)
        life.close()
        life = Life(tmp_path).resume(2)
        undone += life.recovery.tokens_undone
        assert life.buffer.accounts.tokens_ended[ROLLED_BACK] == undone
        life.buffer.check_conservation()
    life.step(2)
    life.save(3)
    life.step(3)
    life.close()
    life = Life(tmp_path).resume(3)
    undone += life.recovery.tokens_undone
    life.close()
    life = Life(tmp_path).resume(2)  # further back than the last rollback: its record is folded in
    assert life.recovery.tokens_undone > 0
    assert life.buffer.accounts.tokens_ended[ROLLED_BACK] == undone + life.recovery.tokens_undone


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_says_what_that_cost(tmp_path):
    life = Life(tmp_path).begin()
    first = identity(life.step(0))
    life.close()
    life = Life(tmp_path).begin()
    assert life.recovery.tokens_undone > 0 and life.buffer.accounts.tokens_received == life.recovery.tokens_undone
    assert identity(life.step(0)) == first


@pytest.mark.parametrize("lost", [False, True])
def test_a_step_stopped_half_way_goes_on_with_what_it_had(tmp_path, lost):
    """Stopped in the middle of step 3, twice. Then back to the checkpoint before it: nothing of its half is left."""
    # One token an engine step and long answers, so that there is a middle.
    shape = {"max_jump": 1, "length_of": lambda request_id: 20 + sample_seed(1, request_id, 0, 0) % 30}
    life = Life(tmp_path, **shape).begin()
    for step in range(3):
        life.step(step)
    life.save(3)
    tokens_at_3 = life.buffer.accounts.tokens_received

    def some_tokens_in(buffer):
        return buffer.accounts.tokens_received > tokens_at_3 + 20

    def some_group_admitted(buffer):
        return bool(buffer.admitted)

    for number in (1, 2):
        assert life.step(3, should_stop=some_tokens_in if number == 1 else some_group_admitted) is None
        life.buffer.check_conservation(under_way=True)
        received, states = balanced(life.buffer), life.buffer.states()
        life.save(3, under_way=True, name=f"3-stopped-{number}")
        if number == 2:
            life.step(3)  # what comes after the save is lost
        after = balanced(life.buffer)
        life.close()
        if lost:
            (tmp_path / "ledger.sqlite").unlink()
        life = Life(tmp_path, **shape).resume(3, f"3-stopped-{number}")
        assert balanced(life.buffer) == received > tokens_at_3 and life.buffer.states() == states
        assert number == 1 or states["ready"] > 0, "what was admitted waits again"
        assert life.recovery.tokens_undone == (0 if lost else after - received)
    assert len(life.step(3)) == 3
    life.buffer.check_ledger()
    life.close()
    life = Life(tmp_path, **shape).resume(3)
    assert balanced(life.buffer) == tokens_at_3 and not life.recovery.note


def balanced(buffer):
    return buffer.accounts.tokens_received - buffer.accounts.tokens_ended[ROLLED_BACK]


def test_compaction_frees_what_no_rollback_can_need(tmp_path):
    life = Life(tmp_path).begin()
    for step in range(3):
        life.step(step)
    life.save(3)
    life.step(3)
    life.save(4)
    kept = identity(life.step(4))
    ledger = life.recovery.ledger
    count = "SELECT count(*) FROM tokens"
    before = ledger.execute(count)[0][0]
    freed = ledger.compact(4)
    assert freed > 0 and ledger.execute(count)[0][0] == before - freed
    assert ledger.compact(4) == 0
    for (draw,) in ledger.execute("SELECT draw FROM ends WHERE step > 4"):
        left = "SELECT count(*) FROM tokens JOIN segments USING (id) WHERE draw = ?"
        assert ledger.execute(left, draw)[0][0] > 0, "a rollback to step 4 would need these"
    life.close()
    life = Life(tmp_path).resume(4)
    assert not life.recovery.note and identity(life.step(4)) == kept
    life.close()
    # From a checkpoint older than the compaction the live file cannot help: the checkpoint's own copy is enough.
    life = Life(tmp_path).resume(3)
    assert "compacted up to step 4" in life.recovery.note
    life.step(3)
    assert identity(life.step(4)) == kept


def test_what_a_killed_process_never_stored_is_reported(tmp_path):
    life = Life(tmp_path).begin()
    life.step(0)
    life.save(1)
    assert Life(tmp_path).resume(1).recovery.unstored_step is None
    life = Life(tmp_path).resume(1)
    collect(life.engine, life.buffer, life.stream, life.scorer, life.settings, step=1)  # and killed before the store
    life.close()
    recovery = Life(tmp_path).resume(1).recovery
    assert (recovery.unstored_step, recovery.tokens_undone) == (2, 0)


def test_a_group_drawn_twice_is_refused_by_the_database(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for draw in range(2):
        ledger.record_draw(draw, 1, next(prompts()), 2)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit()


def test_what_a_prompt_carries_comes_back(tmp_path):
    from rlpost.types import Prompt

    prompt = Prompt(
        uid="3:9",
        token_ids=np.array([1, 2, 300000], np.int32),
        text="é\u2028",
        reference={"a": [1, None]},
        columns={"level": 3},
    )
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.record_draw(0, 7, prompt, 4)
    ledger.commit()
    (group,) = ledger.read_open()
    assert (group.uid, group.order, group.drawn_step, len(group.samples)) == ("3:9", 0, 6, 4)
    back = group.prompt
    assert back.token_ids.tolist() == [1, 2, 300000] and back.token_ids.dtype == np.int32
    assert (back.text, back.reference, back.columns) == ("é\u2028", {"a": [1, None]}, {"level": 3})


def test_a_verdict_pending_at_the_stop_is_asked_for_again_after_a_resume(tmp_path):
    class Slow(InlineScorer):
        """Never gives the verdicts of the second group."""

        def poll(self):
            given = [v for v in self._unpolled if v.uid == "0:0"]
            self._unpolled = [v for v in self._unpolled if v.uid != "0:0"]
            return given

    shape = {"n": 1, "g": 2, "oversample": 2.0, "staleness": 1, "slots": 4, "length_of": lambda request_id: 3}
    shape["reward"] = lambda response, **_: len(response)
    life = Life(tmp_path, **shape).begin()
    life.scorer = Slow(lambda response, **_: 1.0, decode=lambda parts: "")
    life.step(0)
    assert life.buffer.states() == {"scoring": 1} and life.scorer.num_pending == 2
    life.save(1)
    life.close()
    life = Life(tmp_path, **shape).resume(1)
    (group,) = life.step(1)
    assert group.uid == "0:1" and [s.reward for s in group.samples] == [3, 3], "judged by their tokens"


def test_compaction_frees_what_a_restart_gave_up(tmp_path):
    shape = {"n": 1, "g": 1, "slots": 2, "oversample": 2.0, "staleness": 1, "restart_stale": True}
    lengths = {"0:0/0": 60}
    life = Life(tmp_path, **shape, length_of=lambda request_id: lengths.get(request_id, 7)).begin()
    for step in range(8):
        life.step(step)
    ledger = life.recovery.ledger
    attempts = "SELECT DISTINCT attempt FROM segments JOIN tokens USING (id) WHERE draw = 0 ORDER BY 1"
    restarts = ledger.execute("SELECT attempt, step FROM restarts WHERE draw = 0 ORDER BY attempt")
    assert len(restarts) >= 2 and len(ledger.execute(attempts)) == len(restarts) + 1
    ledger.compact(restarts[0][1])
    assert ledger.execute(attempts)[0] == (1,), "the first attempt's tokens are freed, later ones' may be needed"


def rank_lengths(responses, **_):
    assert len(responses) == 3, "a group function was called with a part of a group"
    return [float(len(r) == max(map(len, responses))) for r in responses]


def group_scorer():
    calls = InlineCalls(load_functions(RewardConfig(function=rank_lengths, workers=0)))
    return RewardScorer(calls, lambda parts: "x" * sum(map(len, parts)), group_size=3)


@pytest.mark.parametrize("score_every", [0, 4])
def test_a_group_function_judges_whole_groups_over_steps_and_after_a_resume(tmp_path, score_every):
    """Finished samples of groups that are not whole wait in the scorer; a resume hands them to a new one."""
    shape = {"n": 4, "g": 3, "slots": 8, "staleness": 3, "oversample": 2.0}
    life, trained, handed_over = Life(tmp_path, **shape).begin(), [], 0
    for step in range(9):
        if step in (3, 6):
            handed_over += life.scorer.num_pending
            life.save(step)
            life.close()
            life = Life(tmp_path, **shape).resume(step)
        if step in (0, 3, 6):
            life.scorer, life.settings = group_scorer(), replace(life.settings, score_every=score_every)
        trained += life.step(step)
    assert handed_over > 0, "no group was cut in two by a resume, so nothing was tried"
    assert len(trained) == 36 and len({group.uid for group in trained}) == 36
    for group in trained:
        longest = max(s.num_tokens for s in group.samples)
        assert [s.reward for s in group.samples] == [float(s.num_tokens == longest) for s in group.samples]
