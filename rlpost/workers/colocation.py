"""Engine and trainer take turns on one device.

:class:`SharedDevice` owns whose turn it is, and the order in which memory changes hands around a publication; the
publication itself is ``workers.publication``'s. Called through ``workers.recovery``, or by each cluster worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlpost.engine.protocol import DeviceEngine
from rlpost.train.protocol import ColocatedTrainer
from rlpost.workers.canary import CanarySequence
from rlpost.workers.publication import Publication, Publisher, holds_same_bits


class SharedDevice:
    """Whose turn it is. ``start_worker`` makes it: trainer asleep, engine awake with weights that are not published."""

    def __init__(
        self,
        engine: DeviceEngine,
        trainer: ColocatedTrainer,
        *,
        canary: Sequence[CanarySequence],
        threshold: float,
        moves_memory: bool = True,
    ) -> None:
        """``moves_memory``: whether each leaves its memory to the other; if not, both stay awake all the time."""
        self._engine, self._trainer, self._moves_memory = engine, trainer, moves_memory
        holds = holds_same_bits(engine)
        self._publisher = Publisher(trainer, engine, holds=holds, canary=canary, threshold=threshold)
        self._turn = "engine"

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The engine's turn; leaves with nothing in flight."""
        assert self._turn == "engine", "publish_weights() gives the device to the engine"
        yield
        assert self._engine.num_in_flight == 0, "requests were left in flight"

    @contextmanager
    def training(self) -> Iterator[None]:
        """The trainer's turn, until ``publish_weights`` gives the device back to the engine."""
        if self._turn == "engine":
            if self._moves_memory:
                self._engine.sleep()
                self._trainer.wake()
            self._turn = "trainer"
        yield

    def publish_weights(self, policy_version: int) -> Publication:
        """Copy the trainer's weights into the engine, prove that they arrived, hand the device to the engine.

        Raises:
            RunError: a tensor differs after loading, or the canary's logprobs do.
        """
        publisher = self._publisher
        began = time.perf_counter()
        with self.training():
            began_canary = time.perf_counter()
            expected = publisher.expected_canary()
            canary_s = time.perf_counter() - began_canary
            if self._moves_memory:
                self._engine.wake(("weights",))  # the KV cache waits until the trainer's states are off the device
            started = time.perf_counter()
            num_bytes = publisher.copy()
            loaded = time.perf_counter()
            publisher.check_fingerprint()
            checked = time.perf_counter()
        if self._moves_memory:
            self._trainer.sleep()
            self._engine.wake()
        self._turn = "engine"
        awake = time.perf_counter()
        canary = publisher.check_canary(expected)
        canary_s += time.perf_counter() - awake
        return Publication(
            policy_version=policy_version,
            num_bytes=num_bytes,
            duration_s=time.perf_counter() - began,
            load_s=loaded - started,
            fingerprint_s=checked - loaded,
            canary_s=canary_s,
            canary_mean=canary.mean,
            canary_max=canary.max,
        )
