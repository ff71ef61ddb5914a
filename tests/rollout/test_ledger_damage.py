"""A ledger that is damaged, stale, full or of another make is never silently wrong."""

import json
import sqlite3

import pytest

from rlpost.errors import RunError
from rlpost.rollout.accounts import LedgerError
from rlpost.rollout.ledger import DamagedLedger, Ledger
from rlpost.rollout.ledger_recovery import RecoveredLedger
from tests.rollout.ledger_life import Life, identity, uninterrupted
from tests.rollout.simulation import prompts


def test_a_damaged_ledger_of_a_run_that_starts_over_is_set_aside(tmp_path):
    life = Life(tmp_path).begin()
    for step in range(3):
        life.step(step)
    life.close()
    damage(tmp_path / "ledger.sqlite", "header")
    life = Life(tmp_path).begin()
    assert "could not be used" in life.recovery.note and (tmp_path / "ledger.sqlite.set-aside-1").exists()
    assert life.buffer.accounts.tokens_received == 0 and len(life.step(0)) == 3


def test_a_run_whose_checkpoints_were_taken_away_is_not_started_over(tmp_path):
    life = Life(tmp_path).begin()
    for step in range(3):
        life.step(step)
    life.save(3)
    life.recovery.ledger.compact(3)
    life.close()
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(RunError, match="checkpoints: got .*mentions some.*resume=never"):
        Life(tmp_path).begin()
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


CHANGES = {
    "prompts": "UPDATE prompts SET token_ids = zeroblob(length(token_ids))",
    "finishes": "UPDATE finishes SET finish_reason = 'length'",
    "launches": "UPDATE launches SET step = 1",
    "verdicts": "UPDATE verdicts SET reward = 7",
    "steps": "DELETE FROM steps WHERE step = 2",
    "draws": "UPDATE draws SET step = 1",
}


@pytest.mark.parametrize("table", CHANGES)
def test_whatever_a_resume_rests_on_is_compared(tmp_path, table):
    life = Life(tmp_path, slots=4).begin()
    for step in range(4):
        life.step(step)
    life.save(4)
    expected = identity(life.step(4))
    life.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    assert db.execute(CHANGES[table]).rowcount > 0
    db.commit()
    db.close()
    life = Life(tmp_path, slots=4).resume(4)
    assert f"its {table} differ from the checkpoint's copy" in life.recovery.note
    assert identity(life.step(4)) == expected


def test_a_stale_ledger_is_noticed_also_where_no_group_is_open(tmp_path):
    shape = {"oversample": 1.0, "staleness": 0}
    life = Life(tmp_path, **shape).begin()
    life.step(0)
    life.close()
    old = (tmp_path / "ledger.sqlite").read_bytes()
    life = Life(tmp_path, **shape)
    life._adopt(recover_nothing(tmp_path))
    life.buffer.load_state_dict(*state_of_one_step(life), rolled_back=0)
    life.stream = prompts(life.buffer.accounts.num_drawn)
    for step in (1, 2):
        life.step(step)
    life.save(3)
    life.close()
    (tmp_path / "ledger.sqlite").write_bytes(old)
    life = Life(tmp_path, **shape).resume(3)
    assert "its steps differ from" in life.recovery.note


def recover_nothing(folder):
    return RecoveredLedger(ledger=Ledger(folder / "ledger.sqlite"))


def state_of_one_step(life):
    totals = json.loads(life.recovery.ledger.execute("SELECT totals FROM steps")[0][0])
    sizes = {"groups_per_step": 3, "samples_per_group": 2, "max_staleness": 0}
    return {**sizes, "step": 0, "under_way": False, "totals": totals}, life.recovery.ledger.read_open()


def test_damage_that_no_query_of_a_resume_comes_by_is_found_too(tmp_path):
    life = Life(tmp_path).begin()
    for step in range(4):
        life.step(step)
    life.save(4)
    life.close()
    overwrite_page(tmp_path / "ledger.sqlite", "sqlite_autoindex_draws_1")
    life = Life(tmp_path).resume(4)
    assert "could not be used" in life.recovery.note and len(life.step(4)) == 3


def overwrite_page(path, name):
    """The root page of a table or index."""
    db = sqlite3.connect(path)
    (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    db.close()
    raw = bytearray(path.read_bytes())
    raw[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(bytes(raw))


def damage(path, where):
    if where == "gone":
        path.unlink()
    elif where == "header":
        path.write_bytes(b"not a database" + path.read_bytes()[14:])
    elif where == "pages":
        raw = bytearray(path.read_bytes())
        for page in range(2, len(raw) // 4096):
            raw[page * 4096 : page * 4096 + 64] = b"\xff" * 64
        path.write_bytes(bytes(raw))
    else:
        assert where == "missing rows"
        db = sqlite3.connect(path)
        db.execute("DELETE FROM segments WHERE step = 3")
        db.commit()
        db.close()


@pytest.mark.parametrize("where", ["gone", "header", "pages", "missing rows"])
def test_whatever_happens_to_the_live_file_the_checkpoints_copy_goes_on_with_the_same_groups(tmp_path, where):
    expected = uninterrupted(tmp_path / "whole", 5)
    life = Life(tmp_path / "damaged").begin()
    for step in range(3):
        life.step(step)
    life.save(3)
    life.step(3)
    life.close()
    damage(tmp_path / "damaged/ledger.sqlite", where)
    life = Life(tmp_path / "damaged").resume(3)
    assert "the checkpoint's copy" in life.recovery.note
    assert [(identity(life.step(step)), life.account) for step in (3, 4)] == expected[3:]


def test_tokens_that_changed_on_disk_are_noticed_when_they_are_read(tmp_path):
    life = Life(tmp_path).begin()
    life.step(0)
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("UPDATE tokens SET rollout_logprobs = zeroblob(length(rollout_logprobs))")
    db.commit()
    with pytest.raises(DamagedLedger, match="other bytes.*resume from the last checkpoint"):
        for step in range(1, 4):
            life.step(step)


def test_memory_and_ledger_that_disagree_stop_the_run_with_the_numbers(tmp_path):
    life = Life(tmp_path).begin()
    life.step(0)
    life.recovery.ledger.execute("DELETE FROM segments WHERE id = (SELECT max(id) FROM segments)")
    with pytest.raises(LedgerError, match=r"\(groups, tokens\) held are \(\d+, \d+\) in memory, \(\d+, \d+\) in"):
        life.buffer.check_ledger()


def test_a_full_disk_is_a_clear_line_and_what_was_written_stays(tmp_path):
    life = Life(tmp_path).begin()
    life.step(0)
    life.save(1)
    ledger = life.recovery.ledger
    pages = ledger.execute("PRAGMA page_count")[0][0]
    ledger.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunError, match="ledger.*cannot write.*full.*free space"):
        for step in range(1, 20):
            life.step(step)
    life.close()
    assert not Life(tmp_path).resume(1).recovery.note


def test_another_schema_is_refused_by_name(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(DamagedLedger, match="schema 99.*schema 2"):
        Ledger(path)


@pytest.mark.parametrize("change", [{"n": 2}, {"staleness": 1}, {"g": 5}])
def test_a_resume_that_could_miss_deadlines_is_refused(tmp_path, change):
    life = Life(tmp_path).begin()
    life.step(0)
    life.save(1)
    life.close()
    with pytest.raises(RunError, match="resuming: rollout.*restore the old value"):
        Life(tmp_path, **change).resume(1)
    Life(tmp_path, n=4, staleness=4).resume(1)
