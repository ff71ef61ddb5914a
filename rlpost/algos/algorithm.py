"""One algorithm, put together from its parts by name. Called by ``loop``; the only door into ``algos`` for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlpost.algos import shaping, table
from rlpost.config import AlgoConfig, Config
from rlpost.types import Group

if TYPE_CHECKING:
    from rlpost.algos.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What the loop, the rollout and the trainer need of an algorithm; nothing else reads ``cfg.algo``."""

    cfg: AlgoConfig
    max_response_tokens: int
    objective: Objective  # for PolicyTrainer.update
    estimate: Callable[..., list[np.ndarray]]  # the advantage estimator
    filter: Callable[[Group], str | None]
    needs_old_logprobs: bool  # the trainer runs a proximal pass over every row before the first optimizer step
    needs_reference: bool  # rows need ref_logprobs; without it the reference is not even loaded
    kl_in_reward: bool  # ref_logprobs are needed before advantages (see algos.batch.with_advantages)

    def reject(self, group: Group) -> str | None:
        """Why a complete, scored group may not train, or None."""
        return self.filter(group)

    def advantages(self, groups: Sequence[Group], kl_sums: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """f64[scored samples] per group, over the whole step's groups: shaped rewards, then the estimator.

        ``kl_sums`` (``algos.batch.reward_kl``) is required when ``kl_in_reward``, and not used otherwise.
        """
        rewards = [self._shaped(group) for group in groups]
        if self.kl_in_reward:
            if kl_sums is None:
                raise ValueError("k1 in the reward needs kl_sums; see algos.batch.reward_kl")
            coef = self.cfg.kl_coef
            rewards = [shaping.kl_in_reward(r, kl, coef) for r, kl in zip(rewards, kl_sums, strict=True)]
        advantages = self.estimate(rewards, eps=self.cfg.advantage_eps)
        return _checked(advantages, rewards)

    def _shaped(self, group: Group) -> np.ndarray:
        scored, limit = group.scored, self.max_response_tokens
        punishment = shaping.overlong(
            [s.num_tokens for s in scored],
            max_tokens=limit,
            buffer_tokens=self.cfg.overlong.buffer_tokens or round(self.cfg.overlong.buffer_share * limit),
            penalty=self.cfg.overlong.penalty,
        )
        return np.array([s.reward for s in scored], np.float64) + punishment


def build_algorithm(cfg: Config) -> Algorithm:
    """The algorithm of a resolved config. Raises ConfigError for what cannot work. Imports torch (the losses)."""
    from rlpost.algos.objective import kl_is_in_reward, make_objective

    table.check_algo(cfg.algo, max_response_tokens=cfg.rollout.max_response_tokens)
    max_response_tokens = cfg.rollout.max_response_tokens
    several_updates = cfg.train.optimizer_steps_per_rollout > 1 or cfg.train.epochs > 1
    return Algorithm(
        cfg=cfg.algo,
        max_response_tokens=max_response_tokens,
        objective=make_objective(cfg.algo, max_response_tokens=max_response_tokens),
        estimate=table.resolve("advantage", cfg.algo.advantage),
        filter=table.resolve("filter", cfg.algo.filter),
        needs_old_logprobs=several_updates and cfg.algo.old_logprobs == "trainer",
        needs_reference=cfg.algo.kl_coef > 0,
        kl_in_reward=cfg.algo.kl_coef > 0 and kl_is_in_reward(cfg.algo),
    )


def _checked(advantages: Sequence[np.ndarray], rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A user's estimator must keep the shapes and give finite numbers: anything else would train silently wrong."""
    arrays = [np.asarray(a, np.float64) for a in advantages]
    if [a.shape for a in arrays] != [r.shape for r in rewards]:
        got, expected = [a.shape for a in arrays], [r.shape for r in rewards]
        raise ValueError(f"the advantage estimator returned shapes {got} for rewards of shapes {expected}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("the advantage estimator returned NaN or infinity; a reward may not be finite")
    return arrays
