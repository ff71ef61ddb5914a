"""One algorithm, assembled from its parts by name. Called by ``run``; a run's only entry point to ``algos``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlpost.algos import shaping, table
from rlpost.algos.advantages import FunctionRewards
from rlpost.config import AlgoConfig, Config
from rlpost.types import Group

if TYPE_CHECKING:
    from rlpost.algos.objective import Objective

SINGLE_FUNCTION: Mapping[str, float] = {"": 1.0}  # reward.function, which has no name


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What the loop, the rollout and the trainer need from an algorithm; nothing else reads ``cfg.algo``."""

    cfg: AlgoConfig
    max_response_tokens: int
    objective: Objective  # for PolicyTrainer.update
    estimate: Callable[..., Sequence[Any]]  # the advantage estimator
    estimate_reads: frozenset[str]  # what else it receives: samples, functions (see algos.advantages)
    reward_weights: Mapping[str, float]  # of the reward's functions, by name
    filter: Callable[[Group], str | None]
    needs_old_logprobs: bool  # the trainer runs a proximal pass over every row before the first optimizer step
    needs_reference: bool  # rows need ref_logprobs; otherwise the reference is not loaded at all
    kl_in_reward: bool  # ref_logprobs are needed before advantages (see algos.batch.with_advantages)

    def reject(self, group: Group) -> str | None:
        """Why a complete, scored group may not train, or None."""
        return self.filter(group)

    def advantages(self, groups: Sequence[Group], kl_sums: Sequence[np.ndarray] | None = None) -> list[Any]:
        """The value of each scored sample, or of each of its tokens: shaped rewards, then the estimator.

        Per group f64[scored samples], or a list of f64[R], one per scored sample, if the estimator values tokens.
        ``kl_sums`` (``algos.batch.reward_kl``) is required if ``kl_in_reward``, and unused otherwise.
        """
        rewards = [self._shaped(group) for group in groups]
        if self.kl_in_reward:
            if kl_sums is None:
                raise ValueError("k1 in the reward needs kl_sums; see algos.batch.reward_kl")
            coef = self.cfg.kl_coef
            rewards = [shaping.kl_in_reward(r, kl, coef) for r, kl in zip(rewards, kl_sums, strict=True)]
        more: dict[str, Any] = {}
        if "samples" in self.estimate_reads:
            more["samples"] = [group.scored for group in groups]
        if "functions" in self.estimate_reads:
            more["functions"] = [
                FunctionRewards(name, weight, [_rewards_of(name, group) for group in groups])
                for name, weight in self.reward_weights.items()
            ]
        return _checked(self.estimate(rewards, eps=self.cfg.advantage_eps, **more), rewards, groups)

    def _shaped(self, group: Group) -> np.ndarray:
        scored, limit = group.scored, self.max_response_tokens
        punishment = shaping.overlong(
            [s.num_tokens for s in scored],
            max_tokens=limit,
            buffer_tokens=self.cfg.overlong.buffer_tokens or round(self.cfg.overlong.buffer_share * limit),
            penalty=self.cfg.overlong.penalty,
        )
        return np.array([s.reward for s in scored], np.float64) + punishment


def build_algorithm(cfg: Config, reward_weights: Mapping[str, float] = SINGLE_FUNCTION) -> Algorithm:
    """The algorithm of a resolved config. Raises ConfigError for what cannot work. Imports torch (the losses).

    Args:
        reward_weights: of the reward's functions, by name (``rewards.selection.list_weights``).
    """
    from rlpost.algos.objective import kl_is_in_reward, make_objective

    table.check_algo(cfg.algo, max_response_tokens=cfg.rollout.max_response_tokens)
    max_response_tokens = cfg.rollout.max_response_tokens
    estimate = table.resolve("advantage", cfg.algo.advantage)
    assert set(reward_weights) == (set(cfg.reward.functions) or {""}), "weights of another reward"
    several_updates = cfg.train.optimizer_steps_per_rollout > 1 or cfg.train.epochs > 1
    return Algorithm(
        cfg=cfg.algo,
        max_response_tokens=max_response_tokens,
        objective=make_objective(cfg.algo, max_response_tokens=max_response_tokens),
        estimate=estimate,
        estimate_reads=frozenset(inspect.signature(estimate).parameters) & {"samples", "functions"},
        reward_weights=reward_weights,
        filter=table.resolve("filter", cfg.algo.filter),
        needs_old_logprobs=several_updates and cfg.algo.old_logprobs == "trainer",
        needs_reference=cfg.algo.kl_coef > 0,
        kl_in_reward=cfg.algo.kl_coef > 0 and kl_is_in_reward(cfg.algo),
    )


def _rewards_of(function: str, group: Group) -> np.ndarray:
    """f64[scored samples]: what this function gave each, unshaped; NaN where it had no opinion."""
    if not function:
        return np.array([s.reward for s in group.scored], np.float64)
    return np.array([s.reward_parts.get(function, np.nan) for s in group.scored], np.float64)


def _checked(advantages: Sequence[Any], rewards: Sequence[np.ndarray], groups: Sequence[Group]) -> list[Any]:
    """A user's estimator must keep the shapes and return finite numbers: anything else would silently train wrong."""
    if len(advantages) != len(groups):
        raise ValueError(f"the advantage estimator returned {len(advantages)} groups; expected {len(groups)}")
    return [_checked_group(*each) for each in zip(advantages, rewards, groups, strict=True)]


def _checked_group(advantages: Any, rewards: np.ndarray, group: Group) -> Any:
    """f64[scored samples], or a list of f64[R]: a value per sample, or per token of each."""
    values = [np.asarray(value, np.float64) for value in advantages]
    shapes = [value.shape for value in values]
    of_samples, of_tokens = [()] * len(rewards), [(sample.num_tokens,) for sample in group.scored]
    if shapes not in (of_samples, of_tokens):
        expected = f"one number for each of {len(rewards)} samples, or arrays of their lengths {of_tokens}"
        raise ValueError(f"the advantage estimator returned shapes {shapes} for group {group.uid}; expected {expected}")
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError("the advantage estimator returned NaN or infinity; a reward may not be finite")
    return np.array(values, np.float64) if shapes == of_samples else values
