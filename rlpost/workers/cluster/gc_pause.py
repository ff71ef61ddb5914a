"""Keeps Python's search for reference cycles out of the time in which rollouts are generated.

A cluster's controller holds millions of objects while samples are generated, and none of its own are part of a cycle:
they are freed when the last reference goes away. Searching them for cycles took between a tenth and two fifths of its
CPU time. Other code does leave cycles (libraries, reward functions called in this process, exceptions), so everything
is searched from time to time, between two rollouts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 1 / 1000  # of the elapsed time, at most, is spent on full searches


class CycleSearch:
    """Owned by the object that decides when rollouts are generated; acts on the whole process.

    Args:
        now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.spent_s = 0.0  # on searches, so far
        self._due_s = now()  # the first turn ends with a search: its duration is not known before

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """No search inside the context. Objects alive at its end are not searched again before the next full search."""
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
        """Search everything now; returns the seconds it took."""
        started = time.perf_counter()
        gc.unfreeze()
        gc.collect()
        took_s = time.perf_counter() - started
        self.spent_s += took_s
        self._due_s = self._now() + took_s / SHARE
        return took_s
