"""Per-token surrogate losses. Called by ``algos.objective``; the reduction to a number is in ``algos.reduction``.

Every loss has this form::

    fn(logprobs f[L] with gradient, old_logprobs f[L], advantages f[L], row: TensorRow, cfg: AlgoConfig)
        -> (per-token loss f[L], metrics: dict[name, (sum, count)])

Masked positions hold 0 in every argument (ratio 1, advantage 0); what a loss returns there is dropped, and only has to
be finite. The behavior correction is not part of a loss: its weight is multiplied in afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.algos.tensor_rows import Metrics, TensorRow, ratio_of
from rlpost.config import AlgoConfig


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, row: TensorRow, cfg: AlgoConfig
) -> tuple[Tensor, Metrics]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprobs - old_logprobs).

    PPO, arXiv 1707.06347, eq. 7; separate bounds from DAPO, 2503.14476, eq. 10. With ``dual_clip`` c, if A < 0 the
    loss is at most -c A (1912.09729, eq. 5).
    """
    return _surrogate(ratio_of(logprobs - old_logprobs), advantages, row, cfg)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, row: TensorRow, cfg: AlgoConfig
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate on the sequence's ratio s = exp(mean over t of logprobs - old_logprobs).

    GSPO, arXiv 2507.18071, eq. 5 and 7, in the token form of eq. 13 and 14: s_t = sg(s) exp(logprobs_t -
    sg(logprobs_t)). Its value is s at every token, so a sequence is clipped as a whole; with the sequence mean its
    gradient is that of s itself. With other reductions, sequences are weighted by their length. If advantages differ
    within a sequence, this is GSPO-token.
    """
    sequence_ratio = ratio_of(row.sequence_means((logprobs - old_logprobs).detach()))
    return _surrogate(sequence_ratio * (logprobs - logprobs.detach()).exp(), advantages, row, cfg)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, row: TensorRow, cfg: AlgoConfig
) -> tuple[Tensor, Metrics]:
    """-sg(min(rho, 1 + clip_high)) A logprobs: the weight is clipped, no token's gradient is dropped.

    CISPO (MiniMax-M1), arXiv 2506.13585, eq. 4 and 5. There is no lower bound, as in the paper: ``clip_low`` and
    ``dual_clip`` are unused.
    """
    ratio = ratio_of(logprobs - old_logprobs).detach()
    metrics: Metrics = {
        "loss/ratio": row.mean(ratio),
        "loss/ratio/max": row.max(ratio),
        "loss/clip_high_share": row.mean(ratio > 1 + cfg.clip_high),
    }
    return -ratio.clamp(max=1 + cfg.clip_high) * advantages * logprobs, metrics


def _surrogate(ratio: Tensor, advantages: Tensor, row: TensorRow, cfg: AlgoConfig) -> tuple[Tensor, Metrics]:
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    metrics: Metrics = {
        "loss/ratio": row.mean(ratio),
        "loss/ratio/max": row.max(ratio),
        "loss/clip_low_share": row.mean((ratio < low) & (advantages < 0)),
        "loss/clip_high_share": row.mean((ratio > high) & (advantages > 0)),
    }
    if cfg.dual_clip is not None:
        bound = -cfg.dual_clip * advantages
        metrics["loss/dual_clip_share"] = row.mean((advantages < 0) & (loss > bound))
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return loss, metrics
