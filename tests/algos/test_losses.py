"""Losses: hand-worked numbers, gradients, and GSPO's token form against its sequence-level definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.algos import losses, reduction
from rlpost.config import AlgoConfig
from tests.algos.making import tensor_row


def run(loss, log_ratios, advantages, **cfg):
    """(loss f64[L], gradient of its sum with respect to logprobs, metrics) with old_logprobs = -2."""
    row, _ = tensor_row([{"advantages": advantages}])
    old = torch.full((len(log_ratios),), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    values, metrics = loss(logprobs, old, row.advantages, row, AlgoConfig(**cfg))
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    return values.detach(), gradient, metrics


def test_clipped_by_hand() -> None:
    # rho: 1.5 (above 1.28), 0.5 (below 0.8), and both again with A < 0.
    log_ratios = [math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]
    values, gradient, metrics = run(losses.clipped, log_ratios, [2.0, 2.0, -2.0, -2.0], clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(values, torch.tensor([-2.56, -1.0, 3.0, 1.6], dtype=torch.float64))
    # d(rho A)/dlogprobs = rho A where the ratio itself is active, 0 where the bound is.
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0, 3.0, 0.0], dtype=torch.float64))
    assert metrics["loss/clip_high_share"][0] == 1 and metrics["loss/clip_low_share"][0] == 1
    assert metrics["loss/clip_high_share"][1] == 4
    assert metrics["loss/ratio"][0] == pytest.approx(4.0) and metrics["loss/ratio/max"][0] == pytest.approx(1.5)


def test_dual_clip_bounds_only_negative_advantages() -> None:
    log_ratios = [math.log(10.0), math.log(10.0)]
    values, gradient, metrics = run(losses.clipped, log_ratios, [1.0, -1.0], dual_clip=3.0)
    torch.testing.assert_close(values, torch.tensor([-1.2, 3.0], dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64))
    assert metrics["loss/dual_clip_share"][0] == 1


def test_ratio_one_gives_the_reinforce_gradient() -> None:
    for loss in (losses.clipped, losses.gspo, losses.cispo):
        _, gradient, _ = run(loss, [0.0, 0.0], [1.5, 1.5], clip_low=3e-4, clip_high=4e-4)
        torch.testing.assert_close(gradient, torch.full((2,), -1.5, dtype=torch.float64))


def test_cispo_by_hand() -> None:
    values, gradient, metrics = run(losses.cispo, [math.log(9.0), math.log(0.01)], [2.0, -1.0], clip_high=4.0)
    # weight min(9, 5) = 5 and 0.01, logprobs -2 + log 9 and -2 + log 0.01; every token keeps its gradient.
    expected = torch.tensor([-5 * 2 * (-2 + math.log(9.0)), 0.01 * (-2 + math.log(0.01))], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, torch.tensor([-10.0, 0.01], dtype=torch.float64))
    assert metrics["loss/clip_high_share"][0] == 1


def test_gspo_clips_whole_sequences_by_hand() -> None:
    # Sequence 1: mean log ratio 0.001 -> s = 1.001 > 1.0004, A > 0: clipped, although its first token's ratio is < 1.
    # Sequence 2: mean -0.0002 -> inside.
    specs = [{"advantages": [1.0, 1.0]}, {"advantages": [1.0]}]
    row, _ = tensor_row(specs)
    old = torch.full((3,), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor([-0.002, 0.004, -0.0002], dtype=torch.float64)).requires_grad_()
    values, metrics = losses.gspo(logprobs, old, row.advantages, row, AlgoConfig(clip_low=3e-4, clip_high=4e-4))
    expected = torch.tensor([-1.0004, -1.0004, -math.exp(-0.0002)], dtype=torch.float64)
    torch.testing.assert_close(values.detach(), expected)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -math.exp(-0.0002)], dtype=torch.float64))
    assert metrics["loss/clip_high_share"][0] == 2


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 1e-3, 0.3]))
def test_gspo_gradient_is_that_of_the_sequence_level_definition(seed, scale) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 5]
    specs = []
    for i, n in enumerate(lengths):
        mask = [True] * n
        if i == 2:
            mask[1] = False  # a token in the middle that the policy did not sample
        specs.append({"advantages": [(-1.0) ** i * (1 + i) if m else 0.0 for m in mask], "mask": mask})
    row, batch = tensor_row(specs)
    total = sum(lengths)
    old = torch.where(row.loss_mask, -torch.rand(total, generator=generator, dtype=torch.float64), 0.0)
    noise = scale * torch.randn(total, generator=generator, dtype=torch.float64)
    logprobs = torch.where(row.loss_mask, old + noise, 0.0).requires_grad_()
    cfg = AlgoConfig(clip_low=3e-4, clip_high=4e-4)

    values, _ = losses.gspo(logprobs, old, row.advantages, row, cfg)
    (token_form,) = torch.autograd.grad(reduction.sequence_mean(values, row, batch, constant_length=1), logprobs)

    # Eq. 5 and 7, sequence by sequence.
    objective, start = 0.0, 0
    for i, n in enumerate(lengths):
        kept = row.loss_mask[start : start + n]
        s = torch.exp((logprobs - old)[start : start + n][kept].mean())
        advantage = (-1.0) ** i * (1 + i)
        objective = objective + torch.minimum(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage) / len(lengths)
        start += n
    (sequence_form,) = torch.autograd.grad(-objective, logprobs)
    torch.testing.assert_close(token_form, sequence_form)


@pytest.mark.parametrize("loss", [losses.clipped, losses.gspo, losses.cispo])
@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
def test_extreme_ratios_stay_finite(loss, log_ratio) -> None:
    for advantage in (1.0, -1.0):
        values, gradient, _ = run(loss, [log_ratio], [advantage])
        assert values.isfinite().all() and gradient.isfinite().all()
