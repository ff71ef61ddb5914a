"""The objective: a slow reference, invariance to the split, masked garbage, and which policy each ratio compares."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.algos import batch as batching
from rlpost.algos.objective import make_objective, nll
from rlpost.config import AlgoConfig
from tests.algos.making import fake_policy, packed_row, random_groups, with_old

LOSSES = ["clipped", "gspo", "cispo"]
REDUCTIONS = ["token_mean", "sequence_mean", "constant_length"]
CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]


def total(objective, rows, batch, theta):
    """Loss of the whole batch and its gradient: the sum over rows, as the trainer adds them."""
    loss = torch.zeros((), dtype=torch.float64)
    for row, logprobs in zip(rows, fake_policy(rows, theta), strict=True):
        loss = loss + objective(logprobs, logprobs * -0.5, row, batch)[0]
    return loss.detach(), torch.autograd.grad(loss, theta)[0]


def parameters(seed: int = 0) -> torch.Tensor:
    return torch.randn(51, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def slow_loss(cfg: AlgoConfig, batch, rows, theta, length: int) -> float:
    """Every formula written out per token, in Python floats."""
    value = 0.0
    for row, logprobs in zip(rows, fake_policy(rows, theta), strict=True):
        logprobs = logprobs.detach().numpy()
        for sid in set(row.sequence_ids.tolist()) - {-1}:
            at = [t for t in range(len(logprobs)) if row.sequence_ids[t] == sid and row.loss_mask[t]]
            behaviour = [float(row.old_logprobs[t]) - float(row.rollout_logprobs[t]) for t in at]
            moved = [logprobs[t] - float(row.old_logprobs[t]) for t in at]
            mean_behaviour, mean_moved = sum(behaviour) / len(at), sum(moved) / len(at)
            for j, t in enumerate(at):
                advantage = float(row.advantages[t])
                r = math.exp(mean_behaviour if cfg.correction.startswith("sequence") else behaviour[j])
                if cfg.correction == "none":
                    weight = 1.0
                elif cfg.correction.endswith("truncate"):
                    weight = min(r, cfg.correction_cap)
                else:
                    weight = r if cfg.correction_floor <= r <= cfg.correction_cap else 0.0
                rho = math.exp(mean_moved if cfg.loss == "gspo" else moved[j])
                low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
                if cfg.loss == "cispo":
                    token = -min(rho, high) * advantage * logprobs[t]
                else:
                    token = -min(rho * advantage, min(max(rho, low), high) * advantage)
                    if cfg.dual_clip and advantage < 0:
                        token = min(token, -cfg.dual_clip * advantage)
                d = float(row.ref_logprobs[t]) - logprobs[t]
                token = weight * (token + cfg.kl_coef * (math.exp(d) - d - 1))
                token -= cfg.entropy_coef * -0.5 * logprobs[t]
                value += (
                    token
                    / {
                        "token_mean": batch.num_tokens,
                        "sequence_mean": len(at) * batch.num_sequences,
                        "constant_length": length * batch.num_sequences,
                    }[cfg.reduction]
                )
    return value


@pytest.mark.parametrize(("loss", "reduction", "correction"), list(product(LOSSES, REDUCTIONS, CORRECTIONS)))
def test_against_the_slow_reference(loss, reduction, correction) -> None:
    cfg = AlgoConfig(
        loss=loss, reduction=reduction, correction=correction, dual_clip=1.5, kl_coef=0.1, entropy_coef=0.01,
        correction_floor=0.9, correction_cap=1.3,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    groups = random_groups(rng, 3)
    (batch,) = batching.build_batches(groups, [rng.normal(size=3) for _ in groups], policy_version=9, max_row_tokens=40)
    rows = [with_old(row) for row in batch.rows]
    theta = parameters()
    got, _ = total(make_objective(cfg, max_response_tokens=17), rows, batch, theta)
    assert float(got) == pytest.approx(slow_loss(cfg, batch, rows, theta, 17), rel=1e-5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    loss=st.sampled_from(LOSSES),
    reduction=st.sampled_from(REDUCTIONS),
    correction=st.sampled_from(CORRECTIONS),
    limits=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    padding=st.integers(1, 16),
)
def test_invariant_to_rows_padding_and_order(seed, loss, reduction, correction, limits, padding) -> None:
    """The same sequences in other rows, padded or not, in another order: the same loss, gradient and metrics."""
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, 3)
    advantages = [rng.normal(size=3) for _ in groups]
    orders = [rng.permutation(3) for _ in groups]
    shuffled = [replace(g, samples=tuple(g.samples[i] for i in order)) for g, order in zip(groups, orders, strict=True)]
    cfg = AlgoConfig(loss=loss, reduction=reduction, correction=correction, kl_coef=0.1, entropy_coef=0.01)
    objective = make_objective(cfg, max_response_tokens=20)
    theta, results = parameters(seed), []
    for gs, adv, limit, multiple in (
        (groups, advantages, limits[0], 1),
        (shuffled, [a[o] for a, o in zip(advantages, orders, strict=True)], limits[1], padding),
    ):
        (batch,) = batching.build_batches(gs, adv, policy_version=9, max_row_tokens=limit, pad_to_multiple=multiple)
        rows = [with_old(row) for row in batch.rows]
        loss_value, gradient = total(objective, rows, batch, theta)
        results.append((loss_value, gradient, added_up(objective, rows, batch, theta)))
    (loss_a, gradient_a, metrics_a), (loss_b, gradient_b, metrics_b) = results
    torch.testing.assert_close(loss_a, loss_b)
    torch.testing.assert_close(gradient_a, gradient_b)
    assert metrics_a == pytest.approx(metrics_b, rel=1e-6, abs=1e-9)


def added_up(objective, rows, batch, theta) -> dict[str, float]:
    """Metrics as the trainer reduces them."""
    sums: dict[str, tuple[float, float]] = {}
    for row, logprobs in zip(rows, fake_policy(rows, theta), strict=True):
        _, metrics = objective(logprobs, logprobs * -0.5, row, batch)
        assert not sums or list(sums) == list(metrics)  # the same names, in the same order, on every row
        for name, (value, count) in metrics.items():
            assert value.shape == count.shape == () and not value.requires_grad
            before = sums.get(name, (-math.inf if name.endswith("/max") else 0.0, 0.0))
            merged = max(before[0], float(value)) if name.endswith("/max") else before[0] + float(value)
            sums[name] = (merged, before[1] + float(count))
    return {n: v if n.endswith("/max") else v / c if c else 0.0 for n, (v, c) in sums.items()}


def test_ranks_and_microbatches_add_up() -> None:
    """Four ranks, each with a quarter of the rows: the sum of their losses and gradients is the whole's."""
    rng = np.random.default_rng(3)
    groups = random_groups(rng, 4)
    (batch,) = batching.build_batches(groups, [rng.normal(size=3) for _ in groups], policy_version=9, max_row_tokens=20)
    rows = [with_old(r) for r in batch.rows]
    objective = make_objective(AlgoConfig(reduction="sequence_mean"), max_response_tokens=20)
    theta = parameters()
    loss, gradient = total(objective, rows, batch, theta)
    parts = [total(objective, rows[rank::4], replace(batch, rows=tuple(rows[rank::4])), theta) for rank in range(4)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(sum(part[1] for part in parts), gradient)
    metrics = added_up(objective, rows, batch, theta)
    assert metrics["loss/policy"] == pytest.approx(float(loss), rel=1e-6)  # no KL, no entropy: it is the loss


@pytest.mark.parametrize(("loss", "correction"), list(product(LOSSES, CORRECTIONS)))
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_positions_may_hold_anything(loss, correction, garbage) -> None:
    rng = np.random.default_rng(5)
    groups = random_groups(rng, 2)
    (batch,) = batching.build_batches(
        groups, [rng.normal(size=3) for _ in groups], policy_version=9, max_row_tokens=200, pad_to_multiple=256
    )
    clean = with_old(batch.rows[0])
    masked = ~clean.loss_mask
    fields = ("rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    dirty = replace(clean, **{f: np.where(masked, garbage, getattr(clean, f)).astype(np.float32) for f in fields})
    cfg = AlgoConfig(loss=loss, correction=correction, kl_coef=0.1, entropy_coef=0.1)
    objective = make_objective(cfg, max_response_tokens=20)
    results = []
    for row, noise in ((clean, 0.0), (dirty, garbage)):
        leaf = torch.full((len(masked),), -1.5, dtype=torch.float32)
        leaf[torch.as_tensor(masked)] = noise
        leaf.requires_grad_()
        value, metrics = objective(leaf, leaf * 0.5, row, batch)
        results.append((value, torch.autograd.grad(value, leaf)[0], metrics))
    (clean_loss, clean_gradient, clean_metrics), (dirty_loss, dirty_gradient, dirty_metrics) = results
    torch.testing.assert_close(dirty_loss, clean_loss)
    torch.testing.assert_close(torch.nan_to_num(dirty_gradient, nan=7.0), clean_gradient)
    assert (clean_gradient[torch.as_tensor(masked)] == 0).all()
    for name, (metric, _) in dirty_metrics.items():
        torch.testing.assert_close(metric, clean_metrics[name][0])


def one_token(cfg: AlgoConfig, *, logprob=-1.0, rollout=-1.0, old=None, ref=None, advantage=1.0):
    row, batch = packed_row([{"advantages": [advantage], "rollout": [rollout]}])
    arrays = {"old_logprobs": old, "ref_logprobs": ref}
    row = replace(row, **{k: np.array([v], np.float32) for k, v in arrays.items() if v is not None})
    leaf = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    loss, metrics = make_objective(cfg, max_response_tokens=10)(leaf, None, row, batch)
    return loss.item(), torch.autograd.grad(loss, leaf)[0].item(), metrics


def test_one_optimizer_step_weighs_stale_tokens() -> None:
    """Without old_logprobs the ratio is 1, and what acts is the behaviour weight: e^0.5 here."""
    loss, gradient, metrics = one_token(AlgoConfig(), logprob=-1.0, rollout=-1.5)
    assert loss == pytest.approx(-math.exp(0.5)) and gradient == pytest.approx(-math.exp(0.5))
    assert float(metrics["mismatch/lag_0/ratio"][0]) == pytest.approx(math.exp(0.5))
    loss, gradient, _ = one_token(AlgoConfig(correction="none"), logprob=-1.0, rollout=-1.5)
    assert loss == pytest.approx(-1.0) and gradient == pytest.approx(-1.0)


def test_old_logprobs_from_the_trainer_keep_the_two_ratios_apart() -> None:
    loss, _, _ = one_token(AlgoConfig(), logprob=-0.9, old=-1.0, rollout=-1.5)
    assert loss == pytest.approx(-math.exp(0.5) * math.exp(0.1), rel=1e-6)


def test_old_logprobs_from_the_rollout_clip_without_a_weight_on_top() -> None:
    cfg = AlgoConfig(old_logprobs="rollout")
    loss, gradient, metrics = one_token(cfg, logprob=-1.0, rollout=-1.1)
    assert loss == pytest.approx(-math.exp(0.1), rel=1e-6) and gradient == pytest.approx(-math.exp(0.1), rel=1e-6)
    loss, gradient, metrics = one_token(cfg, logprob=-1.0, rollout=-2.5)  # ratio e^1.5: clipped at 1.2
    assert loss == pytest.approx(-1.2) and gradient == 0.0
    assert float(metrics["mismatch/lag_0/abs_log_ratio"][0]) == pytest.approx(1.5)  # still reported
    assert float(metrics["mismatch/lag_0/changed_share"][0]) == 0.0


def test_kl_in_the_loss_carries_the_behaviour_weight() -> None:
    cfg = AlgoConfig(kl_coef=0.5, kl_estimator="k2")
    loss, gradient, metrics = one_token(cfg, logprob=-1.0, rollout=-1.5, ref=-1.4, advantage=0.0)
    assert loss == pytest.approx(0.5 * math.exp(0.5) * 0.4**2 / 2, rel=1e-6)
    assert gradient == pytest.approx(0.5 * math.exp(0.5) * 0.4, rel=1e-6)
    assert float(metrics["loss/kl"][0]) == pytest.approx(0.08, rel=1e-6)
    loss, _, _ = one_token(replace(cfg, old_logprobs="rollout"), rollout=-1.5, ref=-1.4, advantage=0.0)
    assert loss == pytest.approx(0.5 * math.exp(0.5) * 0.4**2 / 2, rel=1e-6)


def test_the_rollout_clip_and_a_kl_in_the_loss_together() -> None:
    """The weight is on the KL alone: the policy loss has its ratio already."""
    cfg = AlgoConfig(kl_coef=0.5, kl_estimator="k2", old_logprobs="rollout")
    loss, _, _ = one_token(cfg, logprob=-1.0, rollout=-1.1, ref=-1.4)
    assert loss == pytest.approx(-math.exp(0.1) + 0.5 * math.exp(0.1) * 0.4**2 / 2, rel=1e-6)


def test_k1_is_reported_and_not_added() -> None:
    loss, gradient, metrics = one_token(AlgoConfig(kl_coef=0.5, kl_estimator="k1"), ref=-1.4, advantage=0.0)
    assert loss == 0.0 and gradient == 0.0
    assert float(metrics["loss/kl"][0]) == pytest.approx(0.4, rel=1e-6)


def test_a_reference_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        one_token(AlgoConfig(kl_coef=0.1))


def test_a_row_without_a_trainable_token_weighs_nothing() -> None:
    row, batch = packed_row([{"advantages": [1.0, 1.0], "mask": [False, False]}])
    leaf = torch.zeros(2, requires_grad=True)
    for objective in (make_objective(AlgoConfig(), max_response_tokens=10), nll):
        loss, _ = objective(leaf, leaf, row, batch)
        assert loss.item() == 0.0 and (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_nll_is_the_token_mean() -> None:
    row, batch = packed_row([{"advantages": [0.0] * 3, "mask": [False, True, True]}, {"advantages": [0.0]}])
    leaf = torch.tensor([-9.0, -1.0, -2.0, -3.0], requires_grad=True)
    loss, metrics = nll(leaf, None, row, batch)
    assert loss.item() == pytest.approx(2.0)
    assert torch.autograd.grad(loss, leaf)[0].tolist() == pytest.approx([0.0, -1 / 3, -1 / 3, -1 / 3])
    assert metrics["loss/nll"][1] == 3
