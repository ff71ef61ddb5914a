"""Logprobs and entropies of chosen tokens from hidden states, without a whole [tokens, vocabulary] tensor.

Owns one autograd function. The logits of a chunk of tokens exist once in the forward pass and once more, recomputed,
in the backward pass; the head's gradient is accumulated in place. Called by ``train.forward``; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Largest temporary of the elementwise passes over a chunk's logits. A chunk's logits themselves take
# chunk_tokens * V * 4 bytes; a second buffer of that size would double the peak.
_SLICE_BYTES = 64 << 20


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``log softmax(z)[target]`` and the entropy of ``softmax(z)`` with ``z = (hidden weight^T + bias) / temperature``.

    hidden [N, H], weight [V, H], bias [V], targets i64[N]; returns (logprobs f32[N], entropy f32[N]), both in nats
    and both differentiable with respect to hidden, weight and bias:
    ``d logprob / d z_j = [j = target] - p_j`` and ``d entropy / d z_j = -p_j (log p_j + entropy)``.
    The softmax is taken in float32 whatever the dtype of the inputs; the head's gradient is accumulated in float32.
    Peak memory above the inputs: one chunk's logits forward; one chunk's logits and the head's gradient backward.
    """
    return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_tokens)  # type: ignore[no-untyped-call]


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        normaliser = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)  # log sum exp z
        logprobs = torch.empty_like(normaliser)
        entropy = torch.empty_like(normaliser)
        for chunk in _chunks(num_tokens, chunk_tokens):
            logits = _logits(hidden[chunk], weight, bias, temperature)
            for rows in _slices(chunk, vocab_size):
                z = logits[rows.start - chunk.start : rows.stop - chunk.start]
                normaliser[rows] = torch.logsumexp(z, dim=1)
                z.sub_(normaliser[rows].unsqueeze(1))  # log p: its mean is exact where that of z would cancel
                logprobs[rows] = z.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
                entropy[rows] = z.exp().mul_(z).sum(1).neg_()
            del logits, z  # before the next chunk's logits are made
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> tuple:  # type: ignore[override]
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None  # no entropy bonus, the usual case: half of the elementwise work
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            d_logits = _logits(hidden[chunk], weight, bias, ctx.temperature)
            for rows in _slices(chunk, weight.shape[0]):
                _logits_to_gradient(
                    d_logits[rows.start - chunk.start : rows.stop - chunk.start],
                    targets[rows],
                    normaliser[rows],
                    entropy[rows],
                    grad_logprobs[rows] / ctx.temperature,
                    None if grad_entropy is None else grad_entropy[rows] / ctx.temperature,
                )
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                if weight.dtype == torch.float32:
                    d_weight.addmm_(d_logits.t(), hidden[chunk])
                else:  # the product of one chunk in the weight's dtype, their sum in float32
                    d_weight += d_logits.t() @ hidden[chunk]
            del d_logits
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """f32[chunk, V], computed in the model's dtype like the engine does, then divided by the temperature."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits += bias
    logits = logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _logits_to_gradient(
    z: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> None:
    """In place: logits z[n, V] become the loss's gradient with respect to them."""
    z.sub_(normaliser.unsqueeze(1))  # log p
    if grad_entropy is None:
        z.exp_().mul_(-grad_logprobs.unsqueeze(1))
    else:
        p = z.exp()
        z.add_(entropy.unsqueeze(1)).mul_(grad_entropy.unsqueeze(1)).add_(grad_logprobs.unsqueeze(1))
        z.mul_(p).neg_()
    z.scatter_add_(1, targets.unsqueeze(1), grad_logprobs.unsqueeze(1))


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _slices(chunk: slice, vocab_size: int) -> Iterator[slice]:
    rows = max(1, _SLICE_BYTES // (4 * vocab_size))
    for start in range(chunk.start, chunk.stop, rows):
        yield slice(start, min(start + rows, chunk.stop))
