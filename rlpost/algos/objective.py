"""Joins loss, correction, reduction, KL and entropy into the objective the trainer calls on every packed row.

An objective is ``(logprobs f[L], entropy f[L], row: PackedRow, batch: TrainBatch) -> (loss f[], metrics)``. The loss
is the row's share over global denominators: shares add up to the batch's loss. ``metrics`` maps a name to (sum,
count) tensors that are added over rows and ranks before the division; names ending in ``/max`` hold (max, count) and
are reduced with max. Every row of a run reports the same names; an entry whose count is 0 is empty.

Whatever logprobs, entropy and the row contain at masked positions, infinities included, affects neither the loss nor
its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlpost.algos import correction, reduction, table
from rlpost.algos.tensor_rows import MAX_LOG_RATIO, Metrics, TensorRow, to_tensors
from rlpost.config import AlgoConfig
from rlpost.types import PackedRow, TrainBatch

Objective = Callable[[torch.Tensor, Any, PackedRow, TrainBatch], tuple[torch.Tensor, Metrics]]


def make_objective(cfg: AlgoConfig, *, max_response_tokens: int) -> Objective:
    """The RL objective of this configuration; raises ConfigError for parts that cannot be resolved.

    - Proximal policy of the clip: ``row.old_logprobs`` if the trainer filled it, else ``logprobs`` detached (one
      optimizer step per rollout: the ratio is 1 and its gradient that of logprobs). With ``old_logprobs=rollout`` it
      is ``rollout_logprobs``: the clip acts against the behavior policy, and no behavior weight is applied on top.
    - The behavior weight (``correction``) multiplies the policy loss, and the KL term, whose expectation is over
      the policy's own tokens. The KL keeps it with ``old_logprobs=rollout``, since it has no clip of its own.
    - KL k2 or k3 is added with ``kl_coef``; k1 is already in the reward and is only reported here.
    """
    loss_fn = table.resolve("loss", cfg.loss)
    reduce_fn = table.resolve("reduction", cfg.reduction)
    correct = table.resolve("correction", cfg.correction)
    estimate_kl = table.resolve("kl_estimator", cfg.kl_estimator)
    against_rollout = cfg.old_logprobs == "rollout"
    kl_in_loss = cfg.kl_coef > 0 and not kl_is_in_reward(cfg)
    if against_rollout and not kl_in_loss:
        correct = correction.none  # nothing would use the weight, so nothing may be reported as truncated
    constant_length = cfg.constant_length or max_response_tokens

    def objective(
        logprobs: torch.Tensor, entropy: torch.Tensor | None, packed: PackedRow, batch: TrainBatch
    ) -> tuple[torch.Tensor, Metrics]:
        row = to_tensors(packed, batch, logprobs)
        logprobs = _masked(logprobs, row)

        def reduce(values: torch.Tensor) -> torch.Tensor:
            return reduce_fn(values, row, batch, constant_length=constant_length)

        proximal = logprobs.detach() if row.old_logprobs is None else row.old_logprobs
        log_ratio = (proximal - row.rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weight, changed = correct(log_ratio, row, floor=cfg.correction_floor, cap=cfg.correction_cap)
        old_logprobs = row.rollout_logprobs if against_rollout else proximal
        values, metrics = loss_fn(logprobs, old_logprobs, row.advantages, row, cfg)
        loss = reduce(values if against_rollout else weight * values)
        share_of_batch = row.num_tokens / max(batch.num_tokens, 1)  # 1 over all rows, so the sum is the batch's loss
        metrics = {**metrics, "loss/policy": (loss.detach(), share_of_batch)}
        if cfg.kl_coef > 0:
            if row.ref_logprobs is None:
                raise ValueError("algo.kl_coef > 0 needs ref_logprobs in every packed row")
            kl = estimate_kl(logprobs, row.ref_logprobs)
            metrics["loss/kl"] = row.mean(kl)
            if kl_in_loss:
                loss = loss + cfg.kl_coef * reduce(weight * kl)
        if entropy is not None:
            entropy = _masked(entropy, row)
            metrics["loss/entropy"] = row.mean(entropy)
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * reduce(entropy)
        moved = logprobs.detach() - old_logprobs
        metrics["loss/approx_kl"] = row.mean(moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 - moved)
        return loss, {**metrics, **correction.statistics(log_ratio, changed, row)}

    return objective


def nll(
    logprobs: torch.Tensor, entropy: torch.Tensor | None, packed: PackedRow, batch: TrainBatch
) -> tuple[torch.Tensor, Metrics]:
    """Supervised training: -logprobs, mean over the trainable tokens of the global batch."""
    row = to_tensors(packed, batch, logprobs)
    values = -_masked(logprobs, row)
    return reduction.token_mean(values, row, batch, constant_length=1), {"loss/nll": row.mean(values)}


def kl_is_in_reward(cfg: AlgoConfig) -> bool:
    part = table.find("kl_estimator", cfg.kl_estimator)
    return part is not None and part.in_reward


def _masked(values: torch.Tensor, row: TensorRow) -> torch.Tensor:
    """0 at masked positions, in value and in gradient (where, not a product: 0 * inf is NaN)."""
    return torch.where(row.loss_mask, values.to(row.advantages.dtype), 0.0)
