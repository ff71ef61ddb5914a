"""A run that hangs reports where: all stacks and the phase's name, then a nonzero exit.

Owns one daemon thread. ``reporting`` and cluster workers call :meth:`Watchdog.beat` whenever there is progress; a phase
that makes none for ``limit_s`` ends the process with exit code 70.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time

EXIT_CODE = 70


class Watchdog:
    """``limit_s=0`` disables it."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.phase = "start"
        self._last_beat_s = time.monotonic()
        self._stopped = threading.Event()
        if limit_s > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, phase: str | None = None) -> None:
        if phase is not None:
            self.phase = phase
        self._last_beat_s = time.monotonic()

    def rest(self) -> None:
        """Nothing is expected until the next beat."""
        self._last_beat_s = math.inf

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 at rest."""
        return max(0.0, time.monotonic() - self._last_beat_s)

    def close(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit_s / 4)):
            silent_s = self.silent_s
            if silent_s > self.limit_s:
                print(
                    f"watchdog: no progress in phase {self.phase!r} for {silent_s:.0f} s "
                    f"(watchdog_s={self.limit_s:g}); all stacks follow, then the run ends; "
                    "run the same command to resume from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(EXIT_CODE)
