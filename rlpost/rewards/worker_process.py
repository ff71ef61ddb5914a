"""One reward worker as the run sees it: a child process, a nonblocking socket, and a termination that leaves nothing.

Owns starting, framing and killing; :mod:`rlpost.rewards.worker_pool` decides what is sent and how long it may take.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.rewards.worker_main import HEADER, encode_frame

MAX_FRAME_BYTES = 1 << 30
KILL_PATIENCE_S = 2.0  # a process waiting for a disk dies only when the disk responds
PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from rlpost.rewards.worker_main import main; main({descriptor}, {parent})"
)


class WorkerProcess:
    """A fresh interpreter in its own session, so that Ctrl-C on the terminal does not reach it."""

    def __init__(self, setup: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        program = PROGRAM.format(path=setup["path"], descriptor=descriptor, parent=os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints belongs with the run's messages, not in its output
            pass_fds=[descriptor],
            env=dict(environment),
            start_new_session=True,
        )
        theirs.close()
        ours.setblocking(False)
        self.socket = ours
        self.pid = self._process.pid
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.send(encode_frame(setup))

    def send(self, frame: bytes) -> None:
        self._outgoing += frame
        self.flush()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def flush(self) -> None:
        """Send as much as the socket accepts now; a worker that is gone is noticed on the next read."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outgoing:
                sent = self.socket.send(self._outgoing)
                del self._outgoing[:sent]

    def receive(self) -> tuple[list[Any], bool]:
        """(complete messages received, whether the worker is alive). Anything but JSON frames counts as its death."""
        alive = self._read_socket()
        messages: list[Any] = []
        while len(self._incoming) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._incoming)
            if size > MAX_FRAME_BYTES:
                return messages, False
            if len(self._incoming) < HEADER.size + size:
                break
            body = bytes(self._incoming[HEADER.size : HEADER.size + size])
            del self._incoming[: HEADER.size + size]
            try:
                messages.append(json.loads(body))
            except ValueError:
                return messages, False
        return messages, alive

    def has_died(self) -> bool:
        """Whether the process ended while something it started holds its socket; it stays a zombie until killed."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # a library in the run waited for any child
            return True

    def hang_up(self) -> None:
        """Close our end: a worker waiting for calls then ends by itself."""
        self.socket.close()

    def kill(self) -> str:
        """End it and everything it started; returns how it had ended, or that it was killed."""
        self.socket.close()
        kill_tree(self.pid)
        status = self._process.wait()
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"

    def _read_socket(self) -> bool:
        try:
            while chunk := self.socket.recv(1 << 20):
                self._incoming += chunk
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        return False


def kill_tree(pid: int) -> None:
    """SIGKILL for our child ``pid``, its process group, and all its descendants that left that group.

    The worker adopts orphans below it (it is their reaper), so daemonized processes are found too. It is stopped first,
    so that it cannot start new ones. ``pid`` must not have been waited for, so that its number is not reused.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    patience = time.monotonic() + KILL_PATIENCE_S
    while (below := find_below(pid)) and time.monotonic() < patience:
        for child in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def find_below(pid: int) -> list[int]:
    """Living descendants of a process, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except OSError:  # it ended in the meantime
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
