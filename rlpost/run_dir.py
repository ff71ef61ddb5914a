"""The run directory: which one a command uses, who holds it, and whether the run in it is finished.

Layout: ``config.yaml`` (resolved), ``metrics.jsonl``, ``rollouts/``, ``checkpoints/step-N/``, ``finished.json`` (only
after the last step), ``lock``. Called by ``loop``; reads and writes nothing but these.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rlpost.errors import RunError, explain

FINISHED = "finished.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDir:
    """A directory that this process holds until it exits; ``note`` is for the user when the name was not free."""

    path: Path
    note: str
    lock: TextIO


def open_run_dir(runs_dir: str, name: str, *, resume: str) -> RunDir:
    """``runs_dir/name``; where a finished run (or, with resume=never, any run) holds the name, ``name-2`` and so on.

    Raises:
        RunError: the directory cannot be written, or a live process is using it.
    """
    for number in itertools.count(1):
        path = Path(runs_dir) / (name if number == 1 else f"{name}-{number}")
        taken = path.exists() and (resume == "never" or (path / FINISHED).exists())
        if not taken:
            break
    note = f"run {name} is taken; this one is {path.name}" if number > 1 else ""
    if (path / "checkpoints").exists():
        note = "; ".join(filter(None, [note, f"going on with the unfinished run in {path}"]))
    return RunDir(path=path, note=note, lock=_lock(path))


def finish(path: Path, summary: dict[str, Any]) -> None:
    (path / FINISHED).write_text(json.dumps(summary, indent=2) + "\n")


def _lock(path: Path) -> TextIO:
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = open(path / "lock", "a+")  # noqa: SIM115 - held until the process exits
    except OSError as error:
        raise RunError(
            explain("run directory", str(path), "a folder this process may write", f"{error.strerror}; set runs_dir")
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise RunError(
            explain(
                "run directory", str(path), "one that no other process uses", f"wait for process {owner}, or set name="
            )
        ) from None
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    return handle
