"""From per-token values to the row's share of the loss, over denominators of the *global* batch.

::

    fn(values f[L], row: TensorRow, batch: TrainBatch, *, constant_length: int) -> f[]

Adding the results of all rows gives the loss of the whole batch, however it is split into rows, micro-batches and
ranks: the trainer adds, and undoes any averaging of its own. An empty batch gives 0.
"""

from __future__ import annotations

import torch

from rlpost.algos.tensor_rows import TensorRow
from rlpost.types import TrainBatch


def token_mean(values: torch.Tensor, row: TensorRow, batch: TrainBatch, *, constant_length: int) -> torch.Tensor:
    """Mean over all trainable tokens. DAPO, arXiv 2503.14476, eq. 12."""
    return _sum(values, row) / max(batch.num_tokens, 1)


def sequence_mean(values: torch.Tensor, row: TensorRow, batch: TrainBatch, *, constant_length: int) -> torch.Tensor:
    """Mean over sequences of the mean over their tokens. GRPO, arXiv 2402.03300, eq. 3."""
    return _sum(values / row.sequence_lengths, row) / max(batch.num_sequences, 1)


def constant_length(values: torch.Tensor, row: TensorRow, batch: TrainBatch, *, constant_length: int) -> torch.Tensor:
    """Mean over sequences of their sum over a constant. Dr. GRPO, arXiv 2503.20783, section 3.2."""
    return _sum(values, row) / (constant_length * max(batch.num_sequences, 1))


def _sum(values: torch.Tensor, row: TensorRow) -> torch.Tensor:
    return torch.where(row.loss_mask, values, 0.0).sum()
