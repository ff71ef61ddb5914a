"""An algorithm built from a config: what it needs, shaped advantages, presets, and a user's own parts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rlpost.algos import batch as batching
from rlpost.algos.algorithm import build_algorithm
from rlpost.config import AlgoConfig, Config, OverlongConfig, RolloutConfig, TrainConfig
from tests.algos.making import fake_policy, group, random_groups, sample, segment, with_old

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "algo").glob("*.yaml"))


def config(**algo) -> Config:
    return Config(algo=AlgoConfig(**algo), rollout=RolloutConfig(max_response_tokens=100))


def preset(path: Path) -> AlgoConfig:
    """The preset over the schema, strictly: an unknown key or a wrong type raises."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AlgoConfig), OmegaConf.load(path)))  # type: ignore[return-value]


def test_all_presets_are_there() -> None:
    names = ["cispo", "dapo", "dr_grpo", "gspo", "grpo", "reinforce_pp", "rloo"]
    assert [p.stem for p in PRESETS] == sorted(names)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_load_strictly_and_train(path) -> None:
    cfg = preset(path)
    assert cfg.name == path.stem
    algorithm = build_algorithm(replace(config(), algo=cfg))
    groups = random_groups(np.random.default_rng(0), 2)
    (batch,) = batching.build_batches(groups, algorithm.advantages(groups), policy_version=9, max_row_tokens=500)
    theta = torch.zeros(51, dtype=torch.float64, requires_grad=True)
    (row,) = batch.rows
    (logprobs,) = fake_policy([row], theta)
    loss, _ = algorithm.objective(logprobs, None, row, batch)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_presets_carry_their_papers_numbers() -> None:
    cfgs = {p.stem: preset(p) for p in PRESETS}
    clips = {name: (c.clip_low, c.clip_high) for name, c in cfgs.items()}
    assert clips["grpo"] == clips["dr_grpo"] == clips["rloo"] == clips["reinforce_pp"] == (0.2, 0.2)
    assert clips["dapo"] == (0.2, 0.28) and clips["gspo"] == (3e-4, 4e-4) and clips["cispo"][1] == 4.0
    assert {name: c.reduction for name, c in cfgs.items()} == {
        "cispo": "token_mean", "dapo": "token_mean", "dr_grpo": "constant_length", "grpo": "sequence_mean",
        "gspo": "sequence_mean", "reinforce_pp": "token_mean", "rloo": "constant_length",
    }  # fmt: skip
    assert cfgs["dapo"].filter == "dynamic_sampling" and cfgs["dapo"].overlong.buffer_share == 4096 / 20480
    assert cfgs["gspo"].correction == "sequence_truncate"
    assert all(c.kl_coef == 0 and c.correction != "none" for c in cfgs.values())


def test_needs() -> None:
    plain = build_algorithm(config())
    assert not (plain.needs_old_logprobs or plain.needs_reference or plain.kl_in_reward)
    for train in (TrainConfig(optimizer_steps_per_rollout=2), TrainConfig(epochs=2)):
        assert build_algorithm(replace(config(), train=train)).needs_old_logprobs
        assert not build_algorithm(replace(config(old_logprobs="rollout"), train=train)).needs_old_logprobs
    k3, k1 = build_algorithm(config(kl_coef=0.1)), build_algorithm(config(kl_coef=0.1, kl_estimator="k1"))
    assert k3.needs_reference and not k3.kl_in_reward and k1.needs_reference and k1.kl_in_reward


def test_advantages_are_shaped_and_aligned_with_scored_samples() -> None:
    long, short, failed = sample(1.0, segment(95)), sample(1.0, segment(10)), sample(None, failure="late")
    algorithm = build_algorithm(config(advantage="dr_grpo", overlong=OverlongConfig(buffer_tokens=10)))
    (values,) = algorithm.advantages([group(long, failed, short)])
    np.testing.assert_allclose(values, [-0.25, 0.25])  # shaped rewards 0.5 and 1
    share = build_algorithm(config(advantage="dr_grpo", overlong=OverlongConfig(buffer_share=0.1)))
    np.testing.assert_allclose(share.advantages([group(long, failed, short)])[0], values)
    assert [a.shape for a in algorithm.advantages([group(failed), group(short)])] == [(0,), (1,)]
    filtering = build_algorithm(config(filter="dynamic_sampling", overlong=OverlongConfig(buffer_tokens=10)))
    assert filtering.reject(group(long, short)) == "equal_rewards"  # filters see the unshaped reward


def test_k1_in_the_reward_from_packed_rows_to_advantages() -> None:
    algorithm = build_algorithm(config(advantage="dr_grpo", kl_coef=0.1, kl_estimator="k1"))
    groups = random_groups(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="kl_sums"):
        algorithm.advantages(groups)
    batches = batching.build_batches(groups, policy_version=9, max_row_tokens=30, num_parts=2)
    batches = [replace(b, rows=tuple(with_old(r) for r in b.rows)) for b in batches]  # the trainer's passes
    kl_sums = batching.reward_kl(batches, groups)
    advantages = algorithm.advantages(groups, kl_sums)
    for g, kl, got in zip(groups, kl_sums, advantages, strict=True):
        shaped = np.array([s.reward for s in g.samples]) - 0.1 * kl
        np.testing.assert_allclose(got, shaped - shaped.mean())
    final = batching.with_advantages(batches, advantages)
    assert all(r.ref_logprobs is not None for b in final for r in b.rows)


OWN_PARTS = """
import numpy as np


def rank(groups, *, eps, spread=1.0):
    return [spread * (np.argsort(np.argsort(g)) - (len(g) - 1) / 2) for g in groups]


def squared(logprobs, old_logprobs, advantages, row, cfg, *, power=2):
    return -advantages * (logprobs - old_logprobs + 1) ** power, {"loss/mine": row.mean(logprobs)}


def only_long(group, *, least):
    return None if group.num_tokens >= least else "too_short"


def wrong_shape(groups, *, eps):
    return [np.zeros(1) for _ in groups]


def late_tokens(groups, *, eps, samples):
    return [[r * np.arange(s.num_tokens) for r, s in zip(*each)] for each in zip(groups, samples)]


def wrong_length(groups, *, eps, samples):
    return [[np.zeros(s.num_tokens + 1) for s in group] for group in samples]


def not_finite(groups, *, eps):
    return [np.full(len(g), np.nan) for g in groups]
"""


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    package = tmp_path / "my_rl_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rl_parts.parts"
    for name in [n for n in sys.modules if n.startswith("my_rl_parts")]:
        del sys.modules[name]


def test_a_users_own_parts(own_parts) -> None:
    algorithm = build_algorithm(
        config(
            advantage={"_target_": f"{own_parts}.rank", "spread": 2.0},
            loss={"_target_": f"{own_parts}.squared", "power": 3},
            filter={"_target_": f"{own_parts}.only_long", "least": 4},
            correction="none",
        )
    )
    g = group(sample(0.5, segment(1)), sample(0.9, segment(1)), sample(0.1, segment(1)), prompt_tokens=1)
    assert algorithm.reject(g) == "too_short"
    (values,) = algorithm.advantages([g])
    assert values.tolist() == [0.0, 2.0, -2.0]
    (batch,) = batching.build_batches([g], [values], policy_version=0, max_row_tokens=64)
    (row,) = batch.rows
    leaf = torch.full((6,), -1.0, requires_grad=True)
    loss, metrics = algorithm.objective(leaf, None, row, batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # d/dx of -A (x - old + 1)^3 at x = old is -3 A, over 3 tokens.
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 0.0, -2.0, 0.0, 2.0])
    assert metrics["loss/mine"][1] == 3


def test_a_users_estimator_may_value_each_token(own_parts) -> None:
    algorithm = build_algorithm(config(advantage=f"{own_parts}.late_tokens", loss=f"{own_parts}.squared"))
    g = group(sample(0.5, segment(2)), sample(1.0, segment(1), segment(2)), prompt_tokens=1)
    (values,) = algorithm.advantages([g])
    assert [v.tolist() for v in values] == [[0.0, 0.5], [0.0, 1.0, 2.0]]
    (batch,) = batching.build_batches([g], [values], policy_version=9, max_row_tokens=64)
    (row,) = batch.rows
    leaf = torch.zeros(7, requires_grad=True)
    loss, _ = algorithm.objective(leaf, None, replace(row, rollout_logprobs=np.zeros(7, np.float32)), batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # d/dx of -A (x - old + 1)^2 at x = old is -2 A, over 5 tokens
    assert gradient.tolist() == pytest.approx([0.0, 0.0, -0.2, 0.0, 0.0, -0.4, -0.8])


@pytest.mark.parametrize(
    ("name", "message"), [("wrong_shape", "shapes"), ("wrong_length", "shapes"), ("not_finite", "NaN")]
)
def test_a_users_estimator_that_is_wrong_is_named(own_parts, name, message) -> None:
    algorithm = build_algorithm(config(advantage=f"{own_parts}.{name}"))
    with pytest.raises(ValueError, match=message):
        algorithm.advantages([group(sample(1.0, segment(1)), sample(0.0, segment(1)))])
