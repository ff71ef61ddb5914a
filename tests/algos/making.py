"""Small groups, batches and logprobs for the tests of ``rlpost.algos``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlpost.algos import batch as batching
from rlpost.algos.tensor_rows import TensorRow, to_tensors
from rlpost.types import Group, PackedRow, Prompt, Sample, Segment, TrainBatch


def segment(tokens: int, version: int = 0, *, trainable: bool = True, logprob: float = -1.0) -> Segment:
    ids = np.arange(1, tokens + 1, dtype=np.int32)
    return Segment(
        token_ids=ids,
        rollout_logprobs=np.full(tokens, logprob, np.float32),
        policy_version=version,
        trainable=trainable,
    )


def sample(reward: float | None, *segments: Segment, index: int = 0, failure: str | None = None) -> Sample:
    return Sample(uid="0:0", index=index, segments=segments, finish_reason="stop", reward=reward, failure=failure)


def group(*samples: Sample, prompt_tokens: int = 2, uid: str = "0:0") -> Group:
    prompt = Prompt(uid=uid, token_ids=np.arange(prompt_tokens, dtype=np.int32), text="?")
    return Group(uid=uid, prompt=prompt, samples=samples)


def random_groups(rng: np.random.Generator, num_groups: int, *, size: int = 3, longest: int = 9) -> list[Group]:
    """Groups with random lengths, rewards, logprobs and up to three versions per sample."""
    groups = []
    for g in range(num_groups):
        samples = []
        for i in range(size):
            lengths = rng.integers(1, longest, size=rng.integers(1, 4))
            segments = [
                Segment(
                    token_ids=rng.integers(1, 50, n).astype(np.int32),
                    rollout_logprobs=-rng.random(n).astype(np.float32),
                    policy_version=v,
                )
                for v, n in enumerate(lengths)
            ]
            samples.append(sample(float(rng.normal()), *segments, index=i))
        groups.append(group(*samples, prompt_tokens=int(rng.integers(1, 5)), uid=f"0:{g}"))
    return groups


def packed_row(sequences: Sequence[dict[str, Any]], *, padding: int = 0) -> tuple[PackedRow, TrainBatch]:
    """One row and its batch from per-token lists: keys mask (all True), advantages, rollout, versions, mixed_kv."""
    members = []
    for spec in sequences:
        n = len(spec["advantages"])
        mask = np.asarray(spec.get("mask", [True] * n))
        members.append(
            batching.TrainSequence(
                token_ids=np.arange(n, dtype=np.int64),
                loss_mask=mask,
                rollout_logprobs=np.asarray(spec.get("rollout", [0.0] * n), np.float32),
                policy_versions=np.asarray(spec.get("versions", [0] * n), np.int32),
                advantages=np.asarray(spec["advantages"], np.float32),
                mixed_kv=np.asarray(spec.get("mixed_kv", [False] * n)),
            )
        )
    total = sum(len(m.token_ids) for m in members)
    batch = batching.build_batch(
        members, policy_version=0, max_row_tokens=total, pad_to_multiple=total + padding if padding else 1
    )
    (row,) = batch.rows
    return row, batch


def tensor_row(sequences: Sequence[dict[str, Any]]) -> tuple[TensorRow, TrainBatch]:
    row, batch = packed_row(sequences)
    return to_tensors(row, batch, torch.zeros(len(row.token_ids), dtype=torch.float64)), batch


def fake_policy(rows: Sequence[PackedRow], theta: torch.Tensor) -> list[torch.Tensor]:
    """logprobs with gradient that depend on the token, its position and ``theta`` f64[51], not on the packing."""
    scored = []
    for row in rows:
        positions = torch.as_tensor(row.position_ids, dtype=torch.float64)
        scored.append(-torch.nn.functional.softplus(theta[torch.as_tensor(row.token_ids)] + 0.1 * torch.sin(positions)))
    return scored


def with_old(row: PackedRow, seed: int = 0) -> PackedRow:
    """The row with old and ref logprobs that depend on token and position only, not on the packing."""
    wave = np.sin(row.token_ids * 1.7 + row.position_ids * 0.3 + seed)
    old, ref = -1 + 0.3 * wave, -1 + 0.2 * np.cos(row.token_ids * 0.9 + row.position_ids)
    mask = row.loss_mask
    return replace(
        row,
        old_logprobs=np.where(mask, old, 0).astype(np.float32),
        ref_logprobs=np.where(mask, ref, 0).astype(np.float32),
    )
