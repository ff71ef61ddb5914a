"""Python's search for reference cycles, kept out of the time in which engines generate.

The controller of a cluster holds millions of objects while samples are generated, and none of them is part of a cycle:
they are freed when the last reference goes. Looking for cycles among them took a tenth to two fifths of its CPU time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FULL_EVERY = 20  # turns: what others left in cycles meanwhile (libraries, exceptions) is found then


class CycleSearch:
    """Owned by whoever says when engines generate; acts on the whole process."""

    def __init__(self) -> None:
        self._turns = 0

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """No search in it. What was made in it is not looked at afterwards either, but for every 20th time."""
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()
        self._turns += 1
        if self._turns % FULL_EVERY == 0:
            gc.unfreeze()
            gc.collect()
