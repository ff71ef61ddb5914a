"""The policy's weights by their Hugging Face names, whole, whatever the ZeRO stage. Called by the trainer.

What is published and exported goes through one iterator of :class:`NamedWeight`. A trainer may compose it: a weight can
be made from several parameters (an adapter merged into its base), and whoever reads weights sees the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn


class NamedWeight(NamedTuple):
    """One weight under its checkpoint name, and how it is made."""

    name: str
    parameters: tuple[nn.Parameter, ...]  # what it is made from, whole while it is made
    make: Callable[..., torch.Tensor]  # of those parameters, detached; has the shape and dtype of the first


NamedWeights = Callable[[nn.Module], Iterator[NamedWeight]]


def own_weights(lm: nn.Module) -> Iterator[NamedWeight]:
    """Each parameter as it is. A tied one is listed once, under the embedding's name, as Hugging Face's files do."""
    for name, parameter in lm.named_parameters():
        yield NamedWeight(name, (parameter,), _itself)


def iter_buckets(
    weights: Iterable[NamedWeight], *, max_bytes: int, partitioned: bool
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """(name, whole tensor) in buckets of at most max_bytes (a larger tensor is a bucket of its own).

    Under ZeRO-3 (``partitioned``) what a bucket is made from is gathered for the time the consumer holds it: every rank
    must consume the iterator to its end, copy what it keeps and write nothing into the tensors.
    """
    for bucket in _buckets(weights, max_bytes):
        parameters = [parameter for weight in bucket for parameter in weight.parameters]
        with _gathered(parameters) if partitioned else nullcontext():
            yield [(weight.name, _made(weight)) for weight in bucket]


def full_state_dict(
    weights: Iterable[NamedWeight], *, max_bytes: int, partitioned: bool, keep: bool
) -> dict[str, torch.Tensor]:
    """All weights copied to host memory; with ``keep`` False this rank only takes part in the gathering."""
    state: dict[str, torch.Tensor] = {}
    for bucket in iter_buckets(weights, max_bytes=max_bytes, partitioned=partitioned):
        if keep:
            state.update({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in bucket})
    return state


def _itself(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


@torch.no_grad()
def _made(weight: NamedWeight) -> torch.Tensor:
    return weight.make(*(parameter.detach() for parameter in weight.parameters))


def _buckets(weights: Iterable[NamedWeight], max_bytes: int) -> Iterator[list[NamedWeight]]:
    bucket: list[NamedWeight] = []
    size = 0
    for weight in weights:
        first = weight.parameters[0]
        num_bytes = getattr(first, "ds_numel", first.numel()) * first.element_size()
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += num_bytes
    if bucket:
        yield bucket


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
