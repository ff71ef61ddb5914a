"""What `rlpost buffer` says is what the rows say, during a run, after a rollback, and after compaction."""

import re
import sys

import pytest

from rlpost.errors import RunError
from rlpost.viewing.ledger_report import describe_draw, describe_ledger
from tests.rollout.ledger_life import Life, reward_with_failures


def number(text, pattern):
    (found,) = re.findall(pattern, text)
    return int(found.replace(",", ""))


def assert_agrees(text, buffer):
    assert number(text, r"groups   ([\d,]+) drawn") == buffer.accounts.num_drawn
    balanced = buffer.accounts.tokens_received - buffer.accounts.tokens_ended["discarded[rollback]"]
    assert number(text, r"tokens   ([\d,]+) received") == balanced
    for state, count in buffer.accounts.groups_ended.items():
        assert number(text, rf"([\d,]+) {re.escape(state)}(?: \+|\n)(?=[\s\S]*\ntokens|tokens)") == count
    for phase, count in buffer.states().items():
        assert number(text, rf"([\d,]+) {phase}\b") == count
    assert "balance" not in text


@pytest.mark.parametrize("compacted", [False, True])
def test_the_sums_are_the_buffers(tmp_path, compacted):
    reject = {"reject": lambda group: "odd" if int(group.uid[2:]) % 5 == 1 else None, "reward": reward_with_failures}
    shape = {"restart_stale": True, "staleness": 1, "slots": 3, "oversample": 4.0, "n": 2, **reject}
    run = Life(tmp_path, **shape).begin()
    for step in range(7):
        run.step(step)
    if compacted:
        run.save(5)
        assert run.recovery.ledger.compact(5) > 0
    text = describe_ledger(tmp_path)
    assert "after step 7" in text and "discarded[restart]" in text and "rejected[odd]" in text
    assert ("were freed" in text) == compacted
    assert_agrees(text, run.buffer)


def test_after_a_rollback_and_from_a_checkpoints_copy_it_still_balances(tmp_path):
    run = Life(tmp_path).begin()
    for step in range(3):
        run.step(step)
    run.save(3)
    run.step(3)
    run.close()
    run = Life(tmp_path).resume(3)
    text = describe_ledger(tmp_path)
    assert_agrees(text, run.buffer)
    assert number(text, r"undone   ([\d,]+) tokens") == run.recovery.tokens_undone > 0
    assert_agrees(describe_ledger(tmp_path / "snapshots/3.sqlite"), run.buffer)


def test_while_a_step_is_under_way_it_tells_what_is_stored(tmp_path):
    from rlpost.rollout.collect import collect

    run = Life(tmp_path).begin()
    run.step(0)
    collect(run.engine, run.buffer, run.stream, run.scorer, run.settings, step=1)
    run.buffer.store()
    text = describe_ledger(tmp_path)
    assert "after step 1" in text and "balance" not in text
    assert number(text, r"groups   ([\d,]+) drawn") == run.buffer.accounts.num_drawn


def test_an_account_that_does_not_balance_is_said(tmp_path):
    run = Life(tmp_path).begin()
    run.step(0)
    run.recovery.ledger.execute("DELETE FROM ends WHERE draw = (SELECT min(draw) FROM ends)")
    run.recovery.ledger.execute("DELETE FROM segments WHERE id = (SELECT min(id) FROM segments)")
    assert "do not balance" in describe_ledger(tmp_path)


@pytest.mark.parametrize(("keep_kv", "word"), [(False, "resumed"), (True, "kept")])
def test_a_life_tells_versions_and_verdicts(tmp_path, keep_kv, word):
    lengths = {"0:0/0": 3, "0:0/1": 40}
    shape = {
        "n": 1,
        "g": 2,
        "slots": 4,
        "staleness": 3,
        "length_of": lambda rid: lengths.get(rid, 5),
        "keep_kv": keep_kv,
    }
    run = Life(tmp_path, **shape).begin()
    for step in range(6):
        run.step(step)
    told = describe_draw(tmp_path, "0:0").splitlines()
    assert told[0].startswith("0:0: draw 0, in step 1; trained in step ")
    assert told[1] == "prompt   p0"
    assert told[2:5] == [
        "sample 0: 3 tokens, stop",
        "    step 1, policy 0: launched, 3 tokens, stop",
        "    step 1: reward 0",
    ]
    assert told[5] == "sample 1: 40 tokens, stop"
    assert "policy 0: launched" in told[6] and told[6].endswith("interrupted")
    assert f": {word}, " in told[7]
    assert sum(int(re.search(r"(\d+) tokens", line)[1]) for line in told[6:] if "policy" in line) == 40
    waiting = [g.uid for g in run.buffer.groups.values()][-1]
    assert describe_draw(tmp_path, waiting).splitlines()[0].endswith("; open")


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(RunError, match="nothing at .*ledger.sqlite"):
        describe_ledger(tmp_path)
    run = Life(tmp_path).begin()
    run.step(0)
    with pytest.raises(RunError, match="uid: got '7:7'.*the last draw was 0:"):
        describe_draw(tmp_path, "7:7")
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "ledger.location").write_text(f"{tmp_path}/ledger.sqlite\n")
    assert "after step 1" in describe_ledger(elsewhere)


def test_a_look_at_a_run_under_way_sees_one_moment(tmp_path):
    """A writer steps as fast as it can in another process; no look may find sums that do not balance."""
    import subprocess

    code = (
        "from pathlib import Path; from tests.rollout.ledger_life import Life\n"
        f"life = Life(Path({str(tmp_path)!r})).begin()\n"
        "for step in range(400):\n    life.step(step)\n    print(step, flush=True) if step == 0 else None\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "0\n"
        texts = []
        while writer.poll() is None and len(texts) < 300:
            texts.append(describe_ledger(tmp_path))
    finally:
        writer.kill()
        writer.wait()
    assert len({text.splitlines()[1] for text in texts}) > 5, "the run went on meanwhile"
    assert not any("balance" in text for text in texts)


def test_a_folder_that_can_only_be_read(tmp_path):
    import os
    import subprocess

    run = Life(tmp_path).begin()
    run.step(0)
    run.close()
    expected = describe_ledger(tmp_path)
    if os.geteuid():
        os.chmod(tmp_path, 0o555)
        assert describe_ledger(tmp_path) == expected
        os.chmod(tmp_path, 0o755)
        return
    script = (  # root may write anywhere but to a read-only mount
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && "
        f"{sys.executable} -c 'from pathlib import Path; from rlpost.viewing.ledger_report import describe_ledger; "
        f'print(describe_ledger(Path("{tmp_path}")))\''
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
