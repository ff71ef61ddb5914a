"""Publishing weights from a trainer to an engine, and the guards that show they arrived.

:class:`Publisher` copies, and checks two of the three guards: the fingerprint (every published tensor is in the engine,
bit for bit in the engine's dtype) and the canary (``workers.canary``: logprobs, trainer against engine). It does not
know whose turn a device is, nor whether both share one: ``workers.colocation`` calls it where they do. The third guard,
each batch's mismatch, is ``train.update_policy``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlpost.engine.protocol import DeviceEngine
from rlpost.errors import RunError, explain
from rlpost.workers.canary import CanaryResult, CanarySequence, compare, require_agreement

BUCKET_BYTES = 256 << 20


class WeightSource(Protocol):
    """A trainer, as far as publishing goes; see ``train.protocol.ColocatedTrainer``."""

    def iter_weights(self, max_bytes: int) -> Iterator[list[tuple[str, Any]]]: ...

    def score(self, sequences: Sequence[Any]) -> list[Any]: ...


class WeightTarget(Protocol):
    """An engine, as far as publishing goes; see ``engine.protocol.DeviceEngine``. It may live in another process."""

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None: ...

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]: ...


Holds = Callable[[str, Any], bool]  # (name, published tensor): whether the engine computes with exactly these bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One weight publication: what moved and how far engine and trainer are apart afterwards."""

    policy_version: int
    num_bytes: int
    duration_s: float  # all of it: canary, copy, fingerprint, and the device changing hands
    load_s: float
    fingerprint_s: float
    canary_s: float  # both sides of it
    canary_mean: float  # |trainer - engine| logprob over the canary's sampled tokens, nats; this is judged
    canary_max: float  # the largest


class Publisher:
    """One source and one target.

    Args:
        holds: how the fingerprint looks into the target: :func:`holds_same_bits`, or :func:`holds_same_digest` where
            its memory is out of reach.
        canary: sequences that both sides score.
        threshold: the largest mean difference of their logprobs that is allowed, nats.
    """

    def __init__(
        self,
        source: WeightSource,
        target: WeightTarget,
        *,
        holds: Holds,
        canary: Sequence[CanarySequence],
        threshold: float,
    ) -> None:
        self._source, self._target, self._holds = source, target, holds
        self._canary, self._threshold = list(canary), threshold

    def expected_canary(self) -> list[np.ndarray]:
        """The source's logprobs of the canary: what the target's must be after a copy."""
        return self._source.score([sequence.token_ids for sequence in self._canary])

    def copy(self) -> int:
        """All weights from source to target; returns their size in bytes."""
        num_bytes = 0

        def counted() -> Iterator[list[tuple[str, Any]]]:
            nonlocal num_bytes
            for bucket in self._source.iter_weights(BUCKET_BYTES):
                num_bytes += sum(t.numel() * t.element_size() for _, t in bucket)
                yield bucket

        self._target.load_weights(counted())
        return num_bytes

    def check_fingerprint(self) -> None:
        """Raises RunError with the name of the first weight that the target does not hold bit for bit."""
        for bucket in self._source.iter_weights(BUCKET_BYTES):
            for name, published in bucket:
                if not self._holds(name, published):
                    raise RunError(
                        explain(
                            f"weight publication: {name}",
                            "other values in the engine than in the trainer",
                            "the same bits",
                            "the engine would sample from another policy than the one trained; please report this",
                        )
                    )

    def check_canary(self, expected: Sequence[np.ndarray]) -> CanaryResult:
        """Raises RunError where the target's logprobs are too far from ``expected``."""
        found = self._target.score([sequence.token_ids for sequence in self._canary])
        result = compare(self._canary, expected, found)
        require_agreement(result, self._threshold)
        return result


def holds_same_bits(engine: DeviceEngine) -> Holds:
    """Reads each weight back from an engine in this process; of an engine's member, its part."""

    def holds(name: str, published: Any) -> bool:
        held = engine.read_weight(name)
        return same_bits(engine.part_of_weight(name, published).to(held.dtype), held)

    return holds


def holds_same_digest(held_digest: Callable[[str], str], dtype: Any) -> Holds:
    """Compares digests: ``held_digest(name)`` is :func:`digest` of the tensor that the engine, in whatever process,
    computes with, in its ``dtype``."""
    return lambda name, published: held_digest(name) == digest(published.to(dtype))


def digest(tensor: Any) -> str:
    """Of shape, dtype and storage bits: equal exactly where :func:`same_bits` holds. Copies to host memory."""
    import torch

    raw = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    hashed = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    hashed.update(raw)
    return hashed.hexdigest()


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors have one shape and dtype and the same storage bits: NaN equals NaN, -0.0 differs from 0.0."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    width = a.element_size()
    flat = [t.to(b.device).contiguous().view(-1) for t in (a, b)]
    whole = all((t.numel() * width) % 8 == 0 and (t.storage_offset() * width) % 8 == 0 for t in flat)
    # whole words where they fit: on a CPU torch compares 8 bytes as fast as 2
    word = torch.int64 if whole else {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return bool(torch.equal(*(t.view(word) for t in flat)))
