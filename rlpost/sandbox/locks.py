"""Which programs may run together on this machine: any number together, or one alone. Host side.

The programs of all reward workers of a user on a machine share two lock files. A program holds the *room* lock shared
while it runs. A program stopped by the wall clock is run again with the room to itself: it takes the *door* lock, which
newcomers also need, and waits there until the room is empty. Waits for: a starting program waits only for one that
waits to be alone or is alone; that one waits for the running ones, which their own limits end. A lock dies with its
process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlpost.errors import RunError, explain


class Turns:
    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: for the lock files; None: this user's own in the system's folder for temporary files."""
        folder = folder or Path(tempfile.gettempdir()) / f"rlpost-sandbox-{os.getuid()}"
        _make_own(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._door = os.open(folder / "door", flags, 0o600)
        self._room = os.open(folder / "room", flags, 0o600)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with _held(self._door, fcntl.LOCK_EX):
            fcntl.flock(self._room, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with _held(self._door, fcntl.LOCK_EX), _held(self._room, fcntl.LOCK_EX):
            yield

    def close(self) -> None:
        os.close(self._door)
        os.close(self._room)


@contextlib.contextmanager
def _held(fd: int, how: int) -> Iterator[None]:
    fcntl.flock(fd, how)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _make_own(folder: Path) -> None:
    """A private folder: other users can write beside it, and could have put something in its place."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        do = "remove it, or set TMPDIR"
        raise RunError(explain("sandbox locks", str(folder), "a folder of this user, closed to others", do))
