"""Python's search for reference cycles, kept out of the time in which rollouts are generated.

The controller of a cluster holds millions of objects while samples are generated, and none of its own are part of a
cycle: they are freed when the last reference goes. Looking for cycles among them took a tenth to two fifths of its CPU
time. Others do leave cycles (libraries, reward functions called in the process, exceptions), so everything is searched
from time to time, between two rollouts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 1 / 1000  # of the time that passes, at most, goes into searching everything


class CycleSearch:
    """Owned by whoever says when rollouts are generated; acts on the whole process.

    Args:
        now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.spent_s = 0.0  # on searches, so far
        self._due_s = now()  # the first turn ends with a search: its time is not known before

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """No search in it. What is alive at its end is not looked at again before everything is."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
        if self._now() >= self._due_s:
            self.search()
        gc.freeze()

    def search(self) -> float:
        """Look at everything now; returns the seconds it took."""
        started = time.perf_counter()
        gc.unfreeze()
        gc.collect()
        took_s = time.perf_counter() - started
        self.spent_s += took_s
        self._due_s = self._now() + took_s / SHARE
        return took_s
