"""From rewards to advantages. NumPy only; called by ``algos.algorithm`` once per step.

Every estimator takes the (shaped) rewards of a step's groups and returns one advantage per sample::

    fn(groups: Sequence[Sequence[float]], *, eps: float) -> list[f64[G_i]]

An estimator that values tokens (credit for each turn of an episode, for example) has an additional parameter
``samples``, receives the samples that the rewards belong to, and returns for each group one array f64[R] per sample, a
value for each of its tokens. One that combines the functions of the reward itself has an additional parameter
``functions`` and receives a :class:`FunctionRewards` for each.

Groups may differ in size (samples without a reward are left out). Results are never NaN: a group of one has no baseline
of its own and gets 0 from every group-relative estimator; equal rewards get exactly 0; an empty group gets an empty
array. Standard deviations are sample ones (ddof 1), as in most published implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Rewards = Sequence[Sequence[float]]


class FunctionRewards(NamedTuple):
    """What one function of the reward gave the step's samples, before weighting and shaping."""

    name: str  # in reward.functions; empty if the reward has a single function
    weight: float
    groups: Sequence[np.ndarray]  # f64[G_i] each; NaN where the function had no opinion


def grpo(groups: Rewards, *, eps: float) -> list[np.ndarray]:
    """A_i = (r_i - mean(r)) / (std(r) + eps). DeepSeekMath, arXiv 2402.03300, section 4.1.2 (outcome supervision)."""
    return [centered / (_std(centered) + eps) if centered.any() else centered for centered in dr_grpo(groups, eps=eps)]


def dr_grpo(groups: Rewards, *, eps: float) -> list[np.ndarray]:
    """A_i = r_i - mean(r): no division by the std. Dr. GRPO, arXiv 2503.20783, section 3.2. ``eps`` is unused."""
    return [_centered(np.asarray(group, np.float64)) for group in groups]


def rloo(groups: Rewards, *, eps: float) -> list[np.ndarray]:
    """A_i = r_i - mean of the other G - 1 = G / (G - 1) (r_i - mean(r)). RLOO, arXiv 2402.14740, section 3.3.

    A group of one has no others: its advantage is 0. ``eps`` is unused.
    """
    return [centered * (len(centered) / max(len(centered) - 1, 1)) for centered in dr_grpo(groups, eps=eps)]


def reinforce_pp(groups: Rewards, *, eps: float) -> list[np.ndarray]:
    """A_i = (r_i - mean(batch)) / (std(batch) + eps), over all samples of the step. arXiv 2501.03262.

    Difference: the paper sums per-token KL from t to the end into each token's return and normalizes over tokens;
    here a sample has one return (k1 summed over the response, see ``algos.shaping``) and counts once, however long.
    Groups play no role, so a group of one is an ordinary sample; a batch of one, or of equal rewards, gets 0.
    """
    rewards = [np.asarray(group, np.float64) for group in groups]
    return _split(_normalized(_centered(_flat(rewards)), eps), rewards)


def reinforce_pp_baseline(groups: Rewards, *, eps: float) -> list[np.ndarray]:
    """A_i = c_i / (std(c over the batch) + eps), c_i = r_i - mean(its group). arXiv 2501.03262, "w/ baseline".

    The batch mean of c is 0 by construction and is not subtracted again. A group of one, or of equal rewards, gets 0.
    """
    centered = dr_grpo(groups, eps=eps)
    return _split(_normalized(_flat(centered), eps), centered)


def gdpo(groups: Rewards, *, eps: float, functions: Sequence[FunctionRewards]) -> list[np.ndarray]:
    """A_i = S_i / (std(S over the batch) + eps), S_i = sum over k of w_k (r_ki - mean(r_k)) / (std(r_k) + eps).

    GDPO, arXiv 2601.05242, eq. 4 to 7: the rewards of each function k are normalized within the group on their own. So
    combinations of rewards with the same sum stay apart, and ``weight`` says how much a function counts, whatever its
    scale. ``groups`` gives sizes only.

    Differences: the paper subtracts the batch mean of S, which is 0 by construction (it is the sum of centered values).
    The paper has no missing values; here, as in TRL, a sample without an opinion of k is left out of k's mean and std
    and gets 0 from it. A function whose rewards in a group are equal adds exactly 0 there.
    """
    sums = [np.zeros(len(group)) for group in groups]
    for _, weight, rewards_of_groups in functions:
        for total, rewards in zip(sums, rewards_of_groups, strict=True):
            known = ~np.isnan(rewards)
            (normalized,) = grpo([rewards[known]], eps=eps)
            total[known] += weight * normalized
    return _split(_normalized(_flat(sums), eps), sums)


def _centered(rewards: np.ndarray) -> np.ndarray:
    """r - mean(r); exactly 0 if all are equal (a mean of equal floats may differ from them in the last bit)."""
    if rewards.size == 0 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def _normalized(values: np.ndarray, eps: float) -> np.ndarray:
    return values / (_std(values) + eps) if values.any() else values


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _split(values: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([len(a) for a in like])[:-1]
    return np.split(values, ends) if like else []
