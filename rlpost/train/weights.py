"""The policy's weights by their Hugging Face names, whole, whatever the ZeRO stage. Called by the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def iter_buckets(lm: nn.Module, *, max_bytes: int, partitioned: bool) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """(name, whole tensor) in buckets of at most max_bytes (a larger tensor is a bucket of its own).

    Names are those of the checkpoint; a tied head is left out, as Hugging Face's files do. Under ZeRO-3
    (``partitioned``) each bucket is gathered for the time the consumer holds it: every rank must consume the iterator
    to its end, copy what it keeps and write nothing into the tensors.
    """
    for bucket in _buckets(lm, max_bytes):
        with _gathered([p for _, p in bucket]) if partitioned else nullcontext():
            yield [(name, parameter.detach()) for name, parameter in bucket]


def full_state_dict(lm: nn.Module, *, max_bytes: int, partitioned: bool, keep: bool) -> dict[str, torch.Tensor]:
    """All weights copied to host memory; with ``keep`` False this rank only takes part in the gathering."""
    state: dict[str, torch.Tensor] = {}
    for bucket in iter_buckets(lm, max_bytes=max_bytes, partitioned=partitioned):
        if keep:
            state.update({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in bucket})
    return state


def _buckets(lm: nn.Module, max_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in lm.named_parameters():  # a tied parameter is listed once, under the embedding's name
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += num_bytes
    if bucket:
        yield bucket


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
