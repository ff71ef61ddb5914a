"""Stop requests: SIGTERM and the first Ctrl-C end a run cleanly, within a deadline.

Owns the two signals while a run lasts. ``run`` checks :attr:`StopRequest.requested` where it can stop, and saves; if
the deadline passes first, the process ends and the last checkpoint remains. A second Ctrl-C ends it immediately, as
does any request before :meth:`StopRequest.wait_for_boundaries` (there is nothing to save) and any request in
deterministic mode (checkpoints exist at step boundaries only).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
WORDS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Stopped(BaseException):
    """A stop request was honored; ``exit_code`` is the shell's for the signal. Not an Exception: nothing may catch
    it."""

    def __init__(self, number: int, *, at_once: bool) -> None:
        """``at_once``: raised at an arbitrary point, so nothing can be saved."""
        super().__init__(WORDS[signal.Signals(number)])
        self.exit_code = 128 + number
        self.at_once = at_once


class StopRequest:
    """Use as a context manager in the main thread (other threads cannot handle signals, so nothing is requested)."""

    def __init__(self, deadline_s: float, say: Callable[[str], None]) -> None:
        """``say`` is called in a signal handler; exceptions it raises (nobody may be reading) are ignored."""
        self.requested: int | None = None  # the signal's number
        self._deadline_s, self._say = deadline_s, say
        self._at_once = True
        self._saved = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def wait_for_boundaries(self) -> None:
        """From now on, a request waits until the loop checks for it."""
        self._at_once = False

    def note_saved(self) -> None:
        """Everything was saved: if the deadline passes now, nothing is lost."""
        self._saved = True

    def raise_if_requested(self) -> None:
        if self.requested is not None:
            raise Stopped(self.requested, at_once=False)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            raise Stopped(number, at_once=True)
        if self.requested is not None:
            if number == signal.SIGINT:
                raise Stopped(number, at_once=True)
            return
        self.requested = number
        self._timer = threading.Timer(self._deadline_s, self._give_up, [number])
        self._timer.daemon = True
        self._timer.start()
        again = "; press Ctrl-C again to exit immediately" if number == signal.SIGINT else ""
        word = WORDS[signal.Signals(number)]
        with contextlib.suppress(OSError, RuntimeError):  # no reader, or the signal interrupted a print
            self._say(f"{word}: saving, within {self._deadline_s:g} s, then the run ends{again}")

    def _give_up(self, number: int) -> None:
        late = f"within {self._deadline_s:g} s of {WORDS[signal.Signals(number)]} (checkpoint.stop_deadline_s)"
        what = f"saved, but did not end {late}" if self._saved else f"not saved {late}; the last checkpoint remains"
        print(f"rlpost: {what}; run the same command to resume from it", file=sys.stderr, flush=True)
        os._exit(128 + number)
