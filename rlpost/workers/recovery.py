"""A run that goes on where workers are lost: all of them anew, in fresh processes, and the phase is made again.

Owns how often that happened within one step, and whether the engines have the weights of this step. ``loop`` makes each
of its moves through :meth:`Recovery.surviving`; how workers come back is their business (``startup.Workers``). With one
worker in the loop's own process nothing here ever happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from rlpost.errors import RunError, WorkerLost, explain
from rlpost.workers.protocol import Workers

T = TypeVar("T")


class Recovery:
    """One life's recoveries.

    Args:
        workers: what is lost and comes back.
        limit: how often within one step.
        begin: called as ``begin("recover")`` before the workers are started anew.
        say: takes messages for the user.
        timed: ``timed("recover")`` takes the time that costs.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        limit: int,
        begin: Callable[[str], None],
        say: Callable[[str], None],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._workers, self._limit, self._begin, self._say, self._timed = workers, limit, begin, say, timed
        self._count = 0  # since the last finished step
        self.is_published = False  # whether the engines have the weights of this step

    def surviving(self, step: int, call: Callable[[], T]) -> T:
        """``call()`` with all workers there; again with fresh ones where some are lost in it.

        step: steps finished so far, whose state the fresh workers take over.
        Raises ShardsLost where that is gone, RunError where workers are lost too often in one step.
        """
        losses: Sequence[str] = self._workers.losses()
        while True:
            try:
                if losses:
                    self._renew(step, "; ".join(losses))
                return call()
            except WorkerLost as lost:
                losses = [str(lost)]

    def step_done(self) -> None:
        self._count = 0

    def _renew(self, step: int, losses: str) -> None:
        self._count += 1
        if self._count > self._limit:
            do = "look at the workers' logs (workers/ in the run's folder); the same command resumes"
            raise RunError(
                explain("workers lost within one step", f"{self._count} times ({losses})", f"<= {self._limit}", do)
            )
        self._begin("recover")
        self._say(f"{losses}; workers are started anew")
        started = time.perf_counter()
        self.is_published = False
        with self._timed("recover"):
            self._workers.recover(step)
        self._say(f"workers are back after {time.perf_counter() - started:.0f} s, at step {step}")
