"""KL estimators: hand-worked numbers, unbiasedness by enumeration, and whose gradient is the KL's."""

from __future__ import annotations

import math

import torch

from rlpost.algos import kl


def test_by_hand() -> None:
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    torch.testing.assert_close(kl.k1(logprobs, ref), torch.tensor([math.log(2.0)]))
    torch.testing.assert_close(kl.k2(logprobs, ref), torch.tensor([math.log(2.0) ** 2 / 2]))
    torch.testing.assert_close(kl.k3(logprobs, ref), torch.tensor([0.5 + math.log(2.0) - 1]))


def test_expectations_and_gradients_over_all_tokens() -> None:
    """With the whole vocabulary enumerated: k1 and k3 are unbiased; k2's gradient is the KL's, k1's is zero."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    ref = torch.tensor([0.1, 0.4, -0.5, 0.2], dtype=torch.float64).log_softmax(0)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    sampling = logprobs.exp().detach()  # tokens are drawn from the policy; a loss does not see that
    for estimator in (kl.k1, kl.k3):
        torch.testing.assert_close((sampling * estimator(logprobs, ref)).sum(), exact)
    gradients = {
        fn.__name__: torch.autograd.grad((sampling * fn(logprobs, ref)).sum(), logits, retain_graph=True)[0]
        for fn in (kl.k1, kl.k2, kl.k3)
    }
    torch.testing.assert_close(gradients["k2"], exact_gradient)
    torch.testing.assert_close(gradients["k1"], torch.zeros(4, dtype=torch.float64))
    assert (gradients["k3"] - exact_gradient).abs().max() > 1e-3


def test_k3_is_finite_far_away() -> None:
    logprobs = torch.tensor([-300.0], requires_grad=True)
    value = kl.k3(logprobs, torch.tensor([0.0]))
    value.sum().backward()
    assert value.isfinite().all() and logprobs.grad.isfinite().all()
