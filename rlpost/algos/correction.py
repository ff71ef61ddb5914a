"""Behavior correction: the weight of a token that was sampled by another policy, or with other numerics.

The behavior ratio is r = exp(old_logprobs - rollout_logprobs): the policy at the start of the update versus the
distribution the token was actually drawn from. Every correction has this form::

    fn(log_ratio f[L] (detached, 0 where masked), row: TensorRow, *, floor: float, cap: float)
        -> (weight f[L], changed bool[L]: truncated or masked)

The weight multiplies the per-token loss and never carries gradient. Masked-out tokens stay in the denominators: a
batch with many of them takes a smaller step. Statistics are kept by version lag: lag 0 is the engine's mismatch (same
version, different numerics); from lag 1 on it is mismatch and staleness together, which cannot be separated. Tokens
sampled with keys and values of older weights (``rollout.keep_kv``) count in none of the lags: they have a separate
entry.
"""

from __future__ import annotations

import torch

from rlpost.algos.tensor_rows import MAX_LOG_RATIO, Metrics, TensorRow, ratio_of

MAX_LAG = 8  # lags from here on share one entry, so that every row and rank reports the same names
Weighted = tuple[torch.Tensor, torch.Tensor]


def none(log_ratio: torch.Tensor, row: TensorRow, *, floor: float, cap: float) -> Weighted:
    """Weight 1: what the APRIL paper and most of its successors do."""
    return torch.ones_like(log_ratio), torch.zeros_like(row.loss_mask)


def token_truncate(log_ratio: torch.Tensor, row: TensorRow, *, floor: float, cap: float) -> Weighted:
    """min(r, cap): truncated importance sampling (TIS; Yao et al. 2025, fengyao.notion.site/off-policy-rl, C = 2)."""
    ratio = ratio_of(log_ratio)
    return ratio.clamp(max=cap), row.loss_mask & (ratio > cap)


def token_mask(log_ratio: torch.Tensor, row: TensorRow, *, floor: float, cap: float) -> Weighted:
    """r inside [floor, cap], else 0: IcePop (Zhao et al. 2025, ringtech.notion.site/icepop), token-level MIS."""
    return _mask(ratio_of(log_ratio), row, floor, cap)


def sequence_truncate(log_ratio: torch.Tensor, row: TensorRow, *, floor: float, cap: float) -> Weighted:
    """min(s, cap), s = exp(mean of log r over the sequence): the geometric mean, the scale of GSPO's own ratio."""
    ratio = ratio_of(row.sequence_means(log_ratio))
    return ratio.clamp(max=cap), row.loss_mask & (ratio > cap)


def sequence_mask(log_ratio: torch.Tensor, row: TensorRow, *, floor: float, cap: float) -> Weighted:
    """s inside [floor, cap], else 0, for whole sequences; geometric means are close to 1, so use narrow bounds."""
    return _mask(ratio_of(row.sequence_means(log_ratio)), row, floor, cap)


def _mask(ratio: torch.Tensor, row: TensorRow, floor: float, cap: float) -> Weighted:
    inside = (ratio >= floor) & (ratio <= cap)
    return torch.where(inside, ratio, 0.0), row.loss_mask & ~inside


def statistics(log_ratio: torch.Tensor, changed: torch.Tensor, row: TensorRow) -> Metrics:
    """By lag 0 .. MAX_LAG - 1 and ``MAX_LAG``_plus, over trainable tokens; a lag without tokens gets count 0. Tokens
    with a mixed KV cache are counted in ``mismatch/mixed_kv`` only.

    ``mismatch/lag_K/ratio`` (mean r), ``/abs_log_ratio`` (mean |log r|, nats), ``/changed_share`` (truncated or
    masked), ``/token_share`` (of all trainable tokens), and over all lags ``mismatch/abs_log_ratio/max``.
    """
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weights = row.loss_mask.to(log_ratio.dtype)
    columns = torch.stack([weights, log_ratio.exp() * weights, log_ratio.abs() * weights, changed * weights], dim=1)
    entries = torch.where(row.mixed_kv, MAX_LAG + 1, row.lags.clamp(0, MAX_LAG))
    sums = columns.new_zeros(MAX_LAG + 2, 4).index_add(0, entries, columns)
    metrics: Metrics = {"mismatch/abs_log_ratio/max": row.max(log_ratio.abs())}
    names = [*(f"lag_{lag}" for lag in range(MAX_LAG)), f"lag_{MAX_LAG}_plus", "mixed_kv"]
    for entry, (count, ratio, distance, touched) in zip(names, (row_of.unbind() for row_of in sums), strict=True):
        name = f"mismatch/{entry}"
        metrics[f"{name}/ratio"] = (ratio, count)
        metrics[f"{name}/abs_log_ratio"] = (distance, count)
        metrics[f"{name}/changed_share"] = (touched, count)
        metrics[f"{name}/token_share"] = (count, row.num_tokens)
    return metrics
