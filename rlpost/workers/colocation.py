"""Engine and trainer take turns on one device, and what the trainer optimises is what the engine samples.

:class:`Device` owns whose turn it is and the three guards of a publication's correctness: the fingerprint (every
published tensor read back from the engine, bit for bit in the engine's dtype), the canary (logprobs of fixed
sequences, trainer against engine), and the per-batch mismatch that ``loop`` feeds back. Called by ``loop`` only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlpost.engine.protocol import DeviceEngine
from rlpost.errors import RunError, explain
from rlpost.train.protocol import RankTrainer
from rlpost.workers.publication import BUCKET_BYTES, Publication, same_bits


class Device:
    """Whose turn it is. ``start_worker`` makes it: trainer asleep, engine awake with weights that are not published."""

    def __init__(
        self, engine: DeviceEngine, trainer: RankTrainer, *, canary: Sequence[np.ndarray], threshold: float
    ) -> None:
        self._engine, self._trainer = engine, trainer
        self._canary, self._threshold = list(canary), threshold
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
            self._engine.sleep()
            self._trainer.wake()
            self._turn = "trainer"
        yield

    def publish_weights(self, policy_version: int) -> Publication:
        """Copy the trainer's weights into the engine, prove that they arrived, hand the device to the engine.

        Raises:
            RunError: a tensor differs after loading, or the canary's logprobs do.
        """
        began = time.perf_counter()
        with self.training():
            began_canary = time.perf_counter()
            expected = self._trainer.score(self._canary)
            canary_s = time.perf_counter() - began_canary
            self._engine.wake(("weights",))  # the KV cache waits until the trainer's states are off the device
            started = time.perf_counter()
            num_bytes = 0

            def counted() -> Iterator[list[tuple[str, Any]]]:
                nonlocal num_bytes
                for bucket in self._trainer.iter_weights(BUCKET_BYTES):
                    num_bytes += sum(t.numel() * t.element_size() for _, t in bucket)
                    yield bucket

            self._engine.load_weights(counted())
            loaded = time.perf_counter()
            self._check_fingerprint()
            checked = time.perf_counter()
        self._trainer.sleep()
        self._engine.wake()
        self._turn = "engine"
        awake = time.perf_counter()
        canary_max = self._check_canary(expected)
        canary_s += time.perf_counter() - awake
        return Publication(
            policy_version=policy_version,
            num_bytes=num_bytes,
            duration_s=time.perf_counter() - began,
            load_s=loaded - started,
            fingerprint_s=checked - loaded,
            canary_s=canary_s,
            canary_max=canary_max,
        )

    def _check_fingerprint(self) -> None:
        """Compares storage bits; of an engine's member, its part."""
        for bucket in self._trainer.iter_weights(BUCKET_BYTES):
            for name, published in bucket:
                held = self._engine.read_weight(name)
                if not same_bits(self._engine.part_of_weight(name, published).to(held.dtype), held):
                    raise RunError(
                        explain(
                            f"weight publication: {name}",
                            "other values in the engine than in the trainer",
                            "the same bits",
                            "the engine would sample from another policy than the one trained; please report this",
                        )
                    )

    def _check_canary(self, expected: Sequence[np.ndarray]) -> float:
        pairs = zip(expected, self._engine.score(self._canary), strict=True)
        worst = float(np.max([np.abs(ours - theirs).max(initial=0.0) for ours, theirs in pairs]))  # a NaN stays NaN
        if not worst <= self._threshold:
            raise RunError(
                explain(
                    "canary: largest logprob difference between trainer and engine",
                    f"{worst:.3g} nats",
                    f"at most {self._threshold:g}",
                    "engine and trainer compute different models; check dtype and model type (canary_threshold)",
                )
            )
        return worst
