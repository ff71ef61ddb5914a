"""Publishing weights from trainer to engine, and the guards that show they arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One weight publication: what moved and how far engine and trainer are apart afterwards."""

    policy_version: int
    num_bytes: int
    duration_s: float  # all of it: canary, copy, fingerprint, and the device changing hands
    load_s: float
    fingerprint_s: float
    canary_s: float  # both sides of it
    canary_max: float  # largest |trainer - engine| logprob over the canary, nats


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


def make_canary(prompts: Sequence[np.ndarray], vocab_size: int, *, max_tokens: int) -> list[np.ndarray]:
    """Fixed sequences: each prompt followed by random tokens of the vocabulary; i32[at most max_tokens]."""
    rng = np.random.default_rng(0)
    return [np.concatenate([p, rng.integers(0, vocab_size, 24)]).astype(np.int32)[:max_tokens] for p in prompts]
