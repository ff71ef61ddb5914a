"""What a run is doing right now: ``status.json``, written at most a few times a second, for outside observers.

Owns the file and its reading. It is replaced by a single rename, so a reader always sees a complete file; nothing in a
run depends on it. ``reporting.reporter`` writes it, ``rlpost watch`` and ``rlpost runs`` read it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "status.json"
INTERVAL_S = 0.5  # between two writes of progress; a new phase is written immediately

Say = Callable[[str], None]


class StatusFile:
    """Created when a run starts. If a write fails (a full disk), it reports that once and stops writing."""

    def __init__(self, run_dir: Path, *, steps: int, say: Say) -> None:
        self._path = run_dir / FILE
        self._partial = run_dir / f".{FILE}"
        self._say = say
        self._broken = False
        self._progress_s = 0.0  # when progress was last written
        self.workers: Callable[[], list[dict[str, Any]]] = list  # of a cluster: rank, host, pid, phase, silent_s
        self._facts: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "steps": steps}
        self._facts |= {"started_at": time.time(), "state": "running"}

    def phase(self, name: str, step: int) -> None:
        """A phase begins after ``step`` finished steps."""
        self._facts |= {"phase": name, "phase_started_at": time.time(), "step": step}
        self._facts |= {"done": 0, "wanted": 0, "running": 0, "open_groups": 0}
        self._write()

    def progress(self, done: int, wanted: int, *, running: int = 0, open_groups: int = 0, left_s: float | None) -> None:
        """How far the phase is; ``left_s``: estimated time until the whole run ends, if known."""
        now = time.monotonic()
        if now - self._progress_s < INTERVAL_S:
            return
        self._progress_s = now
        self._facts |= {"done": done, "wanted": wanted, "running": running, "open_groups": open_groups}
        self._facts["left_s"] = left_s
        self._write()

    def tick(self) -> None:
        """Nothing new except the time and the workers' state."""
        now = time.monotonic()
        if "phase" in self._facts and now - self._progress_s >= INTERVAL_S:
            self._progress_s = now
            self._write()

    def end(self, state: str, reason: str = "") -> None:
        """The run ends by itself: finished, stopped (saved, on request) or failed. A run that was refused before its
        first phase keeps the status of its previous attempt."""
        if "phase" not in self._facts:
            return
        self._facts |= {"state": state, "reason": reason}
        self._write()

    def _write(self) -> None:
        if self._broken:
            return
        try:
            facts = self._facts | {"written_at": time.time(), "workers": self.workers()}
            self._partial.write_text(json.dumps(facts) + "\n")
            os.replace(self._partial, self._path)
        except OSError as error:
            self._broken = True
            self._say(f"status.json cannot be written ({error.strerror}): `rlpost watch` will not see this run live")


def read_status(run_dir: Path) -> dict[str, Any]:
    """The newest status, empty if there is none."""
    try:
        status = json.loads((run_dir / FILE).read_text())
    except FileNotFoundError:
        return {}
    assert isinstance(status, dict)
    return status
