"""A packed row as tensors, as losses, reductions and corrections see it. Built by ``algos.objective``.

The masked-value rule of this package starts here: whatever a masked position held (garbage, infinities), every float
tensor of a :class:`TensorRow` is 0 there, and so are the logprobs given to a loss. A loss may therefore return any
finite value at masked positions; reductions drop them with ``torch.where``, never by multiplying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rlpost.types import PackedRow, TrainBatch

# exp(20) = 4.9e8: beyond it policies are no longer comparable; the gradient is 0 there instead of 0 * inf = NaN.
MAX_LOG_RATIO = 20.0

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name -> (sum, count); the trainer divides after adding up


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRow:
    """One row on the device of its logprobs. L: positions. Floats carry 0 where ``loss_mask`` is False."""

    loss_mask: torch.Tensor  # bool[L]
    num_tokens: torch.Tensor  # f[]; trainable tokens of this row
    advantages: torch.Tensor  # f[L]
    rollout_logprobs: torch.Tensor  # f[L]
    old_logprobs: torch.Tensor | None  # f[L]
    ref_logprobs: torch.Tensor | None  # f[L]
    lags: torch.Tensor  # i64[L]; batch.policy_version - policy_versions, 0 where masked
    mixed_kv: torch.Tensor  # bool[L]; sampled with keys and values of older weights
    local_ids: torch.Tensor  # i64[L]; 0 .. num_local - 1 in this row (padding is a separate sequence)
    num_local: int
    sequence_lengths: torch.Tensor  # f[L]; trainable tokens of the position's whole sequence, at least 1

    def sequence_means(self, values: torch.Tensor) -> torch.Tensor:
        """f[L]: at each position the mean of ``values`` over its sequence's trainable tokens (0 if it has none)."""
        kept = torch.where(self.loss_mask, values, 0.0)
        sums = kept.new_zeros(self.num_local).index_add(0, self.local_ids, kept)
        return sums[self.local_ids] / self.sequence_lengths

    def mean(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum, count) over trainable tokens, detached: one entry of ``Metrics``."""
        return torch.where(self.loss_mask, values.detach().to(self.advantages.dtype), 0.0).sum(), self.num_tokens

    def max(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(max, count) over trainable tokens, 0 if there are none; for names that end in ``/max``."""
        return torch.where(self.loss_mask, values.detach(), 0.0).amax(), self.num_tokens


def to_tensors(row: PackedRow, batch: TrainBatch, like: torch.Tensor) -> TensorRow:
    """The row on ``like``'s device, floats in its dtype (float32 at least)."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    mask = torch.as_tensor(row.loss_mask, device=like.device)

    def floats(values: np.ndarray | torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return torch.where(mask, torch.as_tensor(values, device=like.device).to(dtype), 0.0)

    advantages, rollout_logprobs = floats(row.advantages), floats(row.rollout_logprobs)
    assert advantages is not None and rollout_logprobs is not None
    present, local_ids = np.unique(row.sequence_ids, return_inverse=True)
    lengths = np.append(batch.sequence_lengths, 0)[row.sequence_ids]  # padding's id, -1, reads the appended 0
    lags = np.where(row.loss_mask, batch.policy_version - row.policy_versions.astype(np.int64), 0)
    mixed_kv = row.loss_mask & (False if row.mixed_kv is None else row.mixed_kv)
    return TensorRow(
        loss_mask=mask,
        num_tokens=mask.sum().to(dtype),
        advantages=advantages,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=floats(row.old_logprobs),
        ref_logprobs=floats(row.ref_logprobs),
        lags=torch.as_tensor(lags, device=like.device),
        mixed_kv=torch.as_tensor(mixed_kv, device=like.device),
        local_ids=torch.as_tensor(local_ids.astype(np.int64), device=like.device),
        num_local=len(present),
        sequence_lengths=torch.as_tensor(np.maximum(lengths, 1), device=like.device).to(dtype),
    )


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of a log ratio clamped to +-MAX_LOG_RATIO; the gradient beyond is 0."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
