"""Workers that recover: a call that loses workers is repeated with fresh processes.

:class:`RecoveringWorkers` is what ``run`` and ``loop`` drive. It owns how often workers were lost within one step,
whether the engines have the weights of this step, and who must have the device for a call; how workers come back is
their own concern (``workers.protocol.Workers.recover``). With one worker, in the run's own process, none is ever lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rlpost.engine.protocol import Engine
from rlpost.errors import RunError, WorkerLost, explain
from rlpost.train.protocol import PolicyTrainer
from rlpost.workers.protocol import Workers
from rlpost.workers.publication import Publication

T = TypeVar("T")


class RecoveringWorkers:
    """``step`` counts finished steps; fresh workers start from the state after it.

    Args:
        workers: the workers that may be lost and come back.
        limit: how often within one step.
        begin: called with a phase's name (publish, update, recover) when it begins.
        say: receives messages for the user.
        timed: ``timed(part)`` measures a part of the step (hand_over, keep_state, recover).

    Every method that calls the workers raises ShardsLost if the state after ``step`` is lost with them, and RunError if
    workers are lost too often in one step.
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
        self.step = 0
        self._num_losses = 0  # since the last finished step
        self._is_published = False  # whether the engines have the weights of this step

    @property
    def engine(self) -> Engine:
        return self._workers.engine

    def describe(self) -> list[dict[str, Any]]:
        return self._workers.describe()

    def close(self) -> None:
        self._workers.close()

    # ---- called by the run ----------------------------------------------------------------------------------

    def resume(self, step: int, load: Callable[[PolicyTrainer], None] | None) -> None:
        """Start after ``step``; ``load`` brings the trainer to that state (None: it is as it started)."""
        self.step = step
        if load is not None:
            self.with_trainer(load)
        self._with_recovery(lambda: self._workers.keep(step))

    def publish(self) -> Publication:
        """Copy the trainer's weights to the engines."""
        return self._with_recovery(self._publish)

    @contextmanager
    def generating(self) -> Iterator[Engine]:
        """The engines' turn, with the weights of this step; nothing is left in flight.

        The caller must check for replicas lost in the meantime (``Engine.max_slots``)."""
        self._with_recovery(self._publish_if_needed)
        with self._workers.device.generating():
            yield self._workers.engine

    def with_engine(self, call: Callable[[Engine], T]) -> T:
        """Run ``call`` on the engines with the weights of this step; restart it if it loses all of them."""

        def attempt() -> T:
            self._publish_if_needed()
            result = call(self._workers.engine)
            if not self._workers.engine.max_slots:
                raise WorkerLost("; ".join(self._workers.losses()))
            return result

        return self._with_recovery(attempt)

    def with_trainer(self, call: Callable[[PolicyTrainer], T]) -> T:
        """Run ``call`` while the trainer has the device; restart it if it loses workers."""

        def attempt() -> T:
            with self._workers.device.training():
                return call(self._workers.trainer)

        return self._with_recovery(attempt)

    def update(self, call: Callable[[PolicyTrainer], T]) -> T:
        """Run the step's update, then keep its result outside the workers, so that they can no longer lose it."""

        def attempt() -> T:
            with self._timed("hand_over"), self._workers.device.training():
                self._begin("update")
                result = call(self._workers.trainer)
            self._is_published = False
            with self._timed("keep_state"):
                self._workers.keep(self.step + 1)
            return result

        return self._with_recovery(attempt)

    def step_done(self) -> None:
        self.step += 1
        self._num_losses = 0

    # ---- private --------------------------------------------------------------------------------------------

    def _publish(self) -> Publication:
        self._begin("publish")
        publication = self._workers.device.publish_weights(policy_version=self.step)
        self._is_published = True
        return publication

    def _publish_if_needed(self) -> None:
        if not self._is_published:
            self._publish()

    def _with_recovery(self, call: Callable[[], T]) -> T:
        """Run ``call()`` with all workers present; repeat it with fresh ones if some are lost."""
        losses: Sequence[str] = self._workers.losses()
        while True:
            try:
                if losses:
                    self._restart("; ".join(losses))
                return call()
            except WorkerLost as lost:
                losses = [str(lost)]

    def _restart(self, losses: str) -> None:
        self._num_losses += 1
        if self._num_losses > self._limit:
            do = "check the workers' logs (workers/ in the run's folder), then run the same command to resume"
            raise RunError(
                explain("workers lost within one step", f"{self._num_losses} times ({losses})", f"<= {self._limit}", do)
            )
        self._begin("recover")
        self._say(f"{losses}; restarting all workers")
        started = time.perf_counter()
        self._is_published = False
        with self._timed("recover"):
            self._workers.recover(self.step)
        self._say(f"workers are back after {time.perf_counter() - started:.0f} s, at step {self.step}")
