"""Checkpoints: directories that appear by a single rename once everything in them is on disk.

``checkpoints/step-000010/`` holds the parts that the caller writes, and ``manifest.json`` with the size and checksum of
each file. Owns naming, the order of writes, verification, retention and the choice of the newest intact one; what the
parts mean belongs to ``durable.run_state``, its main caller. ``step-000010-stopped-1`` is a checkpoint of a step
interrupted by a stop request, after 10 finished ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest and of everything in a checkpoint
PARTIAL = ".partial-"
TORCH_WRITER = "inline_container"  # appears in the RuntimeError that torch.save raises when the disk is full
CHUNK_BYTES = 1 << 22

_NAME = re.compile(r"step-(\d{6,})(?:-stopped-(\d+))?")
Write = Callable[[Path], None]


@dataclass(frozen=True, order=True)
class Name:
    """``stopped`` counts the interruptions within the step after ``step``; 0 is the step boundary itself."""

    step: int
    stopped: int = 0

    def __str__(self) -> str:
        return f"step-{self.step:06d}" + (f"-stopped-{self.stopped}" if self.stopped else "")

    @classmethod
    def of(cls, folder: Path) -> Name | None:
        match = _NAME.fullmatch(folder.name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None


def save(root: Path, name: Name, parts: Mapping[str, Write]) -> Path:
    """Write ``root/NAME``: each part by its function at its path, then the manifest; durable and visible atomically.

    Raises:
        RunError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final, partial = root / str(name), root / f"{PARTIAL}{name}"
    try:
        remove_partial(root)
        partial.mkdir(parents=True)
        for part, write in parts.items():
            write(partial / part)
        write_manifest(partial)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _make_room(final)
        partial.rename(final)
        _sync(root)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RunError) or (isinstance(error, RuntimeError) and TORCH_WRITER not in str(error)):
            raise
        reason = getattr(error, "strerror", None) or f"torch could not write ({str(error).splitlines()[0]})"
        do = f"{reason}; free space, then run the same command to resume"
        raise RunError(explain("checkpoint", str(final), "a disk with room", do)) from error
    return final


def write_manifest(folder: Path) -> None:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"format": FORMAT, "files": dict(zip(files, _describe_all(list(files.values())), strict=True))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """Why the checkpoint cannot be used, or None. Reads every byte of it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, list[Any]] = manifest["files"]
        version = manifest["format"]
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if version != FORMAT:
        return f"format {version}, but this version of rlpost reads {FORMAT}"
    for file, (size, _) in files.items():  # sizes first: checking them costs nothing
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != size:
            return f"{file} has {path.stat().st_size:,} bytes, expected {size:,}"
    try:
        found = _describe_all([folder / file for file in files])
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    other = [file for (file, wanted), got in zip(files.items(), found, strict=True) if wanted != got]
    return f"{other[0]} has other bytes" if other else None


def all_checkpoints(root: Path) -> list[tuple[Name, Path]]:
    """All checkpoints by name, oldest first."""
    named = ((Name.of(path), path) for path in root.glob("step-*"))
    return sorted((name, path) for name, path in named if name is not None)


def newest_intact(root: Path, say: Callable[[str], None]) -> tuple[Name, Path] | None:
    """The newest checkpoint whose files are all as written; damaged ones are reported and skipped.

    Raises:
        RunError: there are checkpoints, but none is intact.
    """
    found = all_checkpoints(root)
    sound = last_intact(found, say)
    if found and sound is None:
        do = "set resume=never or name= to start over"
        raise RunError(explain("checkpoints", f"{len(found)} damaged ones in {root}", "an intact one", do))
    return sound


def last_intact(found: Sequence[tuple[Name, Path]], say: Callable[[str], None]) -> tuple[Name, Path] | None:
    """The last of ``found`` whose files are all as written; those after it are reported and skipped."""
    for name, path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return name, path
        say(f"checkpoint {path} is damaged ({damage}); skipping it")
    return None


def clean_up(root: Path, *, keep_last: int, keep_every: int) -> int:
    """Remove checkpoints that are no longer needed; returns the step of the oldest one kept.

    Keeps the newest ``keep_last``, those of every ``keep_every`` steps (0: none of them), and that of an interrupted
    step as long as it is the newest of all.
    """
    found = all_checkpoints(root)
    boundaries = [name for name, _ in found if not name.stopped]
    kept = set(boundaries[-keep_last:]) | {n for n in boundaries if keep_every and n.step % keep_every == 0}
    kept.add(found[-1][0])
    for name, path in found:
        if name not in kept:
            _remove(path)
    return min(name.step for name in kept)


def set_aside_later(root: Path, name: Name) -> list[Path]:
    """Rename checkpoints newer than ``name``: a run that deliberately resumes at ``name`` abandons them."""
    aside = []
    for later, path in all_checkpoints(root):
        if later > name:
            aside.append(path.rename(_free_name(path.with_name(f"set-aside-{path.name}"))))
    return aside


def next_name(root: Path, step: int, *, under_way: bool) -> Name:
    """The name for a checkpoint after ``step`` finished steps; ``under_way``: within the next one."""
    if not under_way:
        return Name(step)
    return Name(step, 1 + max((n.stopped for n, _ in all_checkpoints(root) if n.step == step), default=0))


def remove_partial(root: Path) -> None:
    """Remove what a killed process left partially written or partially removed."""
    for left in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _make_room(final: Path) -> None:
    """Rename a damaged or abandoned checkpoint of the same name before the new one takes the name."""
    if final.exists():
        final.rename(_free_name(final.with_name(f"set-aside-{final.name}")))


def _free_name(path: Path) -> Path:
    candidates: Iterator[Path] = (path.with_name(f"{path.name}-{n}") if n else path for n in range(1 << 20))
    return next(p for p in candidates if not p.exists())


def _remove(path: Path) -> None:
    """Rename it first: a removal that is killed midway then leaves nothing that looks like a checkpoint."""
    doomed = path.rename(path.with_name(f"{PARTIAL}{path.name}"))
    shutil.rmtree(doomed)


def _describe_all(paths: list[Path]) -> list[list[Any]]:
    with ThreadPoolExecutor() as pool:  # hashing and reading release the interpreter's lock
        return list(pool.map(_describe, paths))


def _describe(path: Path) -> list[Any]:
    """[bytes, checksum]."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return [path.stat().st_size, digest.hexdigest()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
