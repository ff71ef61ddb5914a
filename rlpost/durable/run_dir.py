"""The run directory: which one a command uses, which process holds it, and whether the run in it is finished.

Layout: ``config.yaml`` (resolved), ``metrics.jsonl``, ``timeline.jsonl``, ``warnings.jsonl``, ``status.json`` (current
activity), ``rollouts/``, ``ledger.sqlite``, ``checkpoints/step-N/``, ``finished.json`` (only after the last step) and
``lock``. Called by ``run``; of these it reads and writes ``finished.json`` and the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rlpost.config.locations import expand_home
from rlpost.durable import checkpoint
from rlpost.errors import ConfigError, RunError, explain

FINISHED = "finished.json"
WENT_BACK = "went-back-to"
TRACKER_ID = "wandb_run_id"  # the W&B run that a resume continues
MODES = ("auto", "never")  # of resume; anything else is a path


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDir:
    """A directory that this process holds until it exits.

    ``note`` tells the user that the name was taken or that a run is resumed; ``start_from`` is the checkpoint named by
    ``resume=PATH``, None to use the directory's own newest one.
    """

    path: Path
    note: str
    lock: TextIO
    start_from: Path | None = None


def open_run_dir(runs_dir: str, name: str, *, resume: str) -> RunDir:
    """``runs_dir/name``; if a finished run (or, with resume=never, any run) has the name, ``name-2`` and so on.

    ``resume=PATH`` names a checkpoint or a run directory. If it is this run's own, the run goes back to it; if it is
    another run's, this run starts from it, unless it already has checkpoints of its own (the same command resumes).

    Raises:
        RunError: the directory cannot be written, or a live process is using it.
        ConfigError: ``resume`` does not name anything that can be resumed.
    """
    named, path, number, own = _choose(runs_dir, name, resume)
    lock = _lock(path)
    if own and not _was_gone_back_to(path, named):
        return RunDir(path=path, note=f"going back to {named}", lock=lock, start_from=named)
    notes = [f"run {name} is taken; this one is {path.name}"] if number > 1 else []
    has_own = bool(checkpoint.all_checkpoints(path / checkpoint.FOLDER))
    if has_own:
        notes.append(f"resuming the unfinished run in {path}")
    elif named is not None:
        notes.append(f"starting from {named}")
    return RunDir(path=path, note="; ".join(notes), lock=lock, start_from=None if has_own else named)


def peek(runs_dir: str, name: str, *, resume: str) -> tuple[Path, Path | None]:
    """(directory, checkpoint that ``resume=PATH`` named) of the run that :func:`open_run_dir` would open; creates
    nothing. None where the newest checkpoint of the directory's own is resumed."""
    named, path, _, own = _choose(runs_dir, name, resume)
    if own:
        return path, None if _was_gone_back_to(path, named) else named
    return path, None if checkpoint.all_checkpoints(path / checkpoint.FOLDER) else named


def _choose(runs_dir: str, name: str, resume: str) -> tuple[Path | None, Path, int, bool]:
    """(checkpoint that ``resume`` names, directory, its number, whether the checkpoint is the directory's own)."""
    named = None if resume in MODES else find_checkpoint(Path(resume))
    for number in itertools.count(1):
        path = Path(expand_home(runs_dir)) / (name if number == 1 else f"{name}-{number}")
        own = named is not None and named.parent == (path / checkpoint.FOLDER).resolve()
        taken = path.exists() and (resume == "never" or (path / FINISHED).exists())
        if own or not taken:
            return named, path, number, own
    raise AssertionError("a number is free")


def restart(run: RunDir) -> RunDir:
    """The same directory, still locked, for a run that restarts in this process from its newest checkpoint, or from
    its starting point if it has none."""
    has_own = bool(checkpoint.all_checkpoints(run.path / checkpoint.FOLDER))
    return replace(run, note="", start_from=None if has_own else run.start_from)


def note_going_back(path: Path, to: Path) -> None:
    """The run in ``path`` resumes from its checkpoint ``to``: it is no longer finished, and the same command, repeated
    after a kill, resumes from the newest checkpoint instead of going back to ``to`` again."""
    (path / WENT_BACK).write_text(_identity(to))
    (path / FINISHED).unlink(missing_ok=True)


def _was_gone_back_to(path: Path, to: Path | None) -> bool:
    """Whether this going back has begun and is not finished."""
    mark = path / WENT_BACK
    return to is not None and not (path / FINISHED).exists() and mark.is_file() and mark.read_text() == _identity(to)


def _identity(folder: Path) -> str:
    """A checkpoint's name and contents."""
    manifest = folder / checkpoint.MANIFEST
    digest = hashlib.blake2b(manifest.read_bytes(), digest_size=16).hexdigest() if manifest.is_file() else "none"
    return f"{folder.name} {digest}\n"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest one in the run directory at ``path``; absolute."""
    path = Path(expand_home(str(path))).resolve()
    if checkpoint.Name.of(path) is not None and path.is_dir():
        return path
    for root in (path / checkpoint.FOLDER, path):
        found = checkpoint.all_checkpoints(root) if root.is_dir() else []
        if found:
            return found[-1][1]
    what = "a folder without checkpoints" if path.is_dir() else "nothing there"
    raise ConfigError(
        explain("resume", f"{path} ({what})", "auto, never, a run directory or a checkpoint", "check the path")
    )


def finish(path: Path, summary: dict[str, Any]) -> None:
    """The run is over: written under another name first, so that the file is complete or absent."""
    partial = path / f".{FINISHED}"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, path / FINISHED)


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
