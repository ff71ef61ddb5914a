"""Checkpoints: a directory that appears by one rename when everything in it is on disk.

``checkpoints/step-000010/`` holds ``trainer/`` (DeepSpeed's state and torch's random states) and ``state.json``
(step, rollout buffer, prompt cursor, record of the run). Owns naming, order of writes, retention and the choice of
the newest whole one; what is inside belongs to the callers. Called by ``loop``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain

STATE = "state.json"
PREFIX = "step-"
TORCH_WRITER = "inline_container"  # in what torch.save raises, a RuntimeError, where the disk takes no more


def save(root: Path, step: int, state: dict[str, Any], save_trainer: Callable[[Path], None], *, keep_last: int) -> Path:
    """Write ``root/step-N`` for ``step`` finished steps; older ones beyond ``keep_last`` go once it is durable.

    Raises:
        RunError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = root / f"{PREFIX}{step:06d}"
    partial = root / f".partial-{step:06d}"
    try:
        for left in root.glob(".partial-*"):  # of a killed process
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        save_trainer(partial / "trainer")
        (partial / STATE).write_text(json.dumps(state))
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        reason = getattr(error, "strerror", None) or f"torch could not write ({str(error).splitlines()[0]})"
        do = f"{reason}; free space, run again to resume"
        raise RunError(explain("checkpoint", str(final), "a disk with room", do)) from error
    for old in whole(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def whole(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A directory under its final name is complete: the rename came last."""
    return sorted(p for p in root.glob(f"{PREFIX}*") if (p / STATE).is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """The state that :func:`save` was given. Raises RunError for a file that is damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    if not isinstance(state, dict):
        raise damaged(folder, f"{STATE} holds no object")
    return state


def damaged(folder: Path, reason: object) -> RunError:
    """The error for a checkpoint that cannot be read; says how to go on without it."""
    if isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0]}"
    do = f"delete {folder} to resume from the checkpoint before it, or set name= to start anew"
    return RunError(explain("checkpoint", f"{folder} ({reason})", "a whole one, as it was written", do))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
