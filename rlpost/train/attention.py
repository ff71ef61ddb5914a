"""Attention over a packed row without a [L, L] mask: each sequence attends within itself only.

Registered with transformers as an attention implementation and chosen by ``train.model`` where flash attention is not
available. The stock sdpa path builds a mask over the whole row and computes every masked pair: at 1,024 tokens and
hidden 128 that alone costs more than the rest of the model.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

NAME = "rlpost_packed"


def register() -> None:
    """Make ``NAME`` known to transformers; a second call does nothing new."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def sequence_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the sequences in a row; position_ids i64[L] restart at 0 with each of them."""
    starts = (position_ids == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(position_ids)], strict=True)]


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    packed_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of one row; the signature is transformers'.

    query [1, heads, L, D], key and value [1, key heads, L, D]; returns [1, L, heads, D]. ``packed_lengths`` add up to
    L. Neighbours of equal length share one call.
    """
    assert attention_mask is None and dropout == 0.0 and query.shape[0] == 1
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    runs = [(length, len(list(run))) for length, run in groupby(packed_lengths)]
    # One split, not a slice for each run: the gradient of a slice is a row of zeros with that slice filled in.
    parts = zip(
        *(x[0].split([length * count for length, count in runs], dim=1) for x in (query, key, value)), strict=True
    )
    outputs = []
    for (length, count), run in zip(runs, parts, strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run)
        attended = _causal(q, k, v, scaling, sliding_window)  # [count, heads, length, D]
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
