"""The ledger that a run resumes with: the live file rolled back if it is intact, else the checkpoint's own copy.

Makes the choice and reports it; called by ``durable.run_state`` with a checkpoint whose files were verified. An
unusable live file is set aside, never deleted: it may hold the history of what was trained.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlpost.errors import RunError, explain
from rlpost.rollout.ledger import DamagedLedger, Ledger

COMPANIONS = ("", "-wal", "-shm")  # the files SQLite keeps beside a database


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredLedger:
    ledger: Ledger
    groups_undone: int = 0  # draws after the checkpoint: their prompts are drawn again
    tokens_undone: int = 0  # stored after the checkpoint and discarded
    unstored_step: int | None = None  # the step whose tokens were lost with the process before they were stored
    note: str = ""  # for the user, if the live file could not be used


def start_ledger(path: Path) -> RecoveredLedger:
    """The ledger of a run without a checkpoint: empty, except for the count of what earlier attempts lost.

    Raises RunError if the ledger mentions checkpoints: somebody removed them, and starting over would destroy what the
    run left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        do = f"{error.strerror}; set ledger_dir"
        raise RunError(explain("ledger_dir", str(path.parent), "a folder this process may write", do)) from None
    try:
        ledger = Ledger(path)
        if ledger.compacted_to:
            ledger.close()
            got = f"none, but {path} mentions some"
            do = "put them back, or set resume=never or name= to start over beside this run"
            raise RunError(explain("checkpoints", got, "the run's own", do))
        unstored = ledger.unstored_step()
        undone = ledger.roll_back(0)
    except DamagedLedger as error:
        aside = _set_aside(path)
        note = f"the ledger could not be used ({error}); it is kept as {aside} and replaced by a new one"
        return RecoveredLedger(ledger=Ledger(path), note=note)
    return RecoveredLedger(ledger=ledger, groups_undone=undone[0], tokens_undone=undone[1], unstored_step=unstored)


def recover_ledger(path: Path, snapshot: Path, *, step: int) -> RecoveredLedger:
    """The ledger as it was when ``snapshot`` was taken, after ``step`` finished steps."""
    if not path.exists():
        note = f"no ledger at {path}: using the checkpoint's copy; what came after it was not counted"
        return RecoveredLedger(ledger=_copy_of(snapshot, path, step), note=note)
    try:
        ledger = Ledger(path)
    except DamagedLedger as error:
        return _replace(path, snapshot, step, str(error))
    try:
        unstored = ledger.unstored_step()
        reason, undone = _roll_back(ledger, snapshot, step)
    except DamagedLedger as error:
        unstored, reason, undone = None, str(error), (0, 0)
    if reason is not None:
        ledger.close()
        return _replace(path, snapshot, step, reason)
    return RecoveredLedger(ledger=ledger, groups_undone=undone[0], tokens_undone=undone[1], unstored_step=unstored)


def _roll_back(ledger: Ledger, snapshot: Path, step: int) -> tuple[str | None, tuple[int, int]]:
    """(why the live file differs from the snapshot, or None; groups and tokens undone)."""
    if ledger.compacted_to > step:
        return f"it was compacted up to step {ledger.compacted_to}", (0, 0)
    undone = ledger.roll_back(step, snapshot)
    copy = Ledger(snapshot, read_only=True)
    try:
        ours, theirs = ledger.resume_digests(step), copy.resume_digests(step)
        different = [table for table in ours if ours[table] != theirs[table]]
        if different:
            return f"its {', '.join(different)} differ from the checkpoint's copy", undone
    finally:
        copy.close()
    return ledger.damage(), undone


def _replace(path: Path, snapshot: Path, step: int, reason: str) -> RecoveredLedger:
    aside = _set_aside(path)
    note = (
        f"the ledger could not be used ({reason}); it is kept as {aside} and replaced by the checkpoint's copy; what "
        "came after the checkpoint was not counted"
    )
    return RecoveredLedger(ledger=_copy_of(snapshot, path, step), note=note)


def _copy_of(snapshot: Path, path: Path, step: int) -> Ledger:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot, partial)
        os.replace(partial, path)
    except OSError as error:
        do = f"{error.strerror}; free space or fix the permissions, then run the same command to resume"
        raise RunError(explain("ledger", str(path), "a writable disk", do)) from error
    ledger = Ledger(path)
    assert ledger.compacted_to == step, "a checkpoint's copy can only be rolled back to its own step"
    return ledger


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    for suffix in COMPANIONS:
        source = path.with_name(path.name + suffix)
        if source.exists():
            os.replace(source, aside.with_name(aside.name + suffix))
    return aside
