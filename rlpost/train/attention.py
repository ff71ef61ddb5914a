"""Attention over a packed row without a [L, L] mask: each sequence attends within itself only.

Registered with transformers as an attention implementation and chosen by ``train.model`` where flash attention is not
available. The stock sdpa path builds a mask over the whole row and computes every masked pair: at 1,024 tokens and
hidden 128 that alone costs more than the rest of the model.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

NAME = "rlpost_packed"


def register() -> None:
    """Make ``NAME`` known to transformers; a second call does nothing new."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def sequence_lengths(position_ids: np.ndarray) -> list[int]:
    """Lengths of the sequences in a row; position_ids i64[L] restart at 0 with each of them."""
    starts = np.flatnonzero(position_ids == 0)
    return np.diff(starts, append=len(position_ids)).tolist()


def describe_row(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """What :func:`packed_attention` is told of a row, once for all layers."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"packed_lengths": lengths, "packed_bounds": bounds.to(device, non_blocking=True)}


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    packed_lengths: list[int],
    packed_bounds: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of one row; the signature is transformers'.

    query [1, heads, L, D], key and value [1, key heads, L, D]; returns [1, L, heads, D]. ``packed_lengths`` add up to
    L; ``packed_bounds`` i32[sequences + 1] are where each begins and the last ends.
    """
    assert attention_mask is None and dropout == 0.0 and query.shape[0] == 1
    if _has_kernel(query):
        return _in_one_kernel(query, key, value, packed_bounds, max(packed_lengths), scaling, sliding_window), None
    return _by_sequence(query, key, value, packed_lengths, scaling, sliding_window), None


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether torch's attention over sequences of several lengths takes this: half precision, on a GPU since Ampere."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (
        query.shape[-1] <= 256 and query.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def _in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """By torch's kernel for sequences of several lengths, which also needs no mask."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, D]
    left = -1 if window is None else window - 1  # beside the token itself; -1: all
    gqa = query.shape[1] != key.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=gqa)
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


def _by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Neighbours of equal length share one call."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    # One split, not a slice for each run: the gradient of a slice is a row of zeros with that slice filled in.
    parts = zip(
        *(x[0].split([length * count for length, count in runs], dim=1) for x in (query, key, value)), strict=True
    )
    outputs = []
    for (length, count), run in zip(runs, parts, strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run)
        attended = _causal(q, k, v, scaling, window)  # [count, heads, length, D]
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    length, gqa = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)
