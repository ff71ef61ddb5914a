"""Chunked logprobs and entropies against a whole log softmax, values and gradients."""

import pytest
import torch
from torch.nn import functional

from rlpost.train import head_logprobs as module
from rlpost.train.head_logprobs import head_logprobs


def whole(hidden, weight, bias, targets, temperature):
    logits = functional.linear(hidden, weight, bias).float() / temperature
    logp = functional.log_softmax(logits, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def inputs(dtype=torch.float64, num_tokens=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, 8), (41, 8), (41,))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    targets = torch.randint(0, 41, (num_tokens,), generator=generator)
    return [t.requires_grad_() for t in (hidden, weight, bias)], targets


def gradients(outputs, leaves, which):
    """Of a weighted sum, with a different weight for each token."""
    weights = torch.linspace(-1.0, 2.0, len(outputs[0]))
    total = sum((outputs[i] * weights * (1 + i)).sum() for i in which)
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_whole_log_softmax(chunk_tokens, which, with_bias, monkeypatch):
    monkeypatch.setattr(module, "_SLICE_BYTES", 41 * 4 * 3)  # elementwise passes of three tokens
    (hidden, weight, bias), targets = inputs(torch.float32)
    bias = bias if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    ours = head_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_tokens=chunk_tokens)
    theirs = whole(hidden, weight, bias, targets, 0.7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, leaves, which), gradients(theirs, leaves, which), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_hand_worked_two_token_vocabulary():
    """Logits (0, ln 3): p = (1/4, 3/4); entropy = ln 4 - (3/4) ln 3."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [torch.log(torch.tensor(3.0))]])
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(-0.2876820724)
    assert entropy.item() == pytest.approx(0.5623351446)


def test_bfloat16_head_stays_near_float32():
    (hidden, weight, _), targets = inputs(torch.bfloat16)
    ours = head_logprobs(hidden, weight, targets, chunk_tokens=4)
    theirs = whole(hidden.float(), weight.float(), None, targets, 1.0)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.02, atol=0.06)
    ours_grad, theirs_grad = (gradients(x, (hidden, weight), (0,)) for x in (ours, theirs))
    assert [g.dtype for g in ours_grad] == [torch.bfloat16, torch.bfloat16]
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_frozen_head_and_no_tokens():
    (hidden, weight, _), targets = inputs(torch.float32)
    logprobs, _ = head_logprobs(hidden, weight.detach(), targets)
    logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None
    empty, _ = head_logprobs(hidden[:0], weight, targets[:0])
    empty.sum().backward()
    assert empty.shape == (0,) and float(weight.grad.abs().max()) == 0.0


def test_only_one_chunk_of_logits_exists_at_once(monkeypatch):
    """No tensor as large as [tokens, vocabulary] is made, forward or backward."""
    sizes = []
    original = module._logits

    def spy(hidden, *rest):
        sizes.append(len(hidden))
        return original(hidden, *rest)

    monkeypatch.setattr(module, "_logits", spy)
    (hidden, weight, _), targets = inputs(torch.float32)
    head_logprobs(hidden, weight, targets, chunk_tokens=10)[0].sum().backward()
    assert sizes == [10, 10, 3, 10, 10, 3]
