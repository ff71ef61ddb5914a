"""What is added to a reward before advantages are computed. NumPy only; the unshaped reward stays in the sample.

Filters and reported accuracy read the unshaped reward; only the advantages see the shaped one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray


def overlong(lengths: Numbers, *, max_tokens: int, buffer_tokens: int, penalty: float) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): f64[G], from -penalty to 0, added to rewards.

    ``lengths``: response tokens of each sample, over all its segments. 0 up to max_tokens - buffer_tokens, falling
    linearly to -penalty at max_tokens, -penalty beyond. ``buffer_tokens`` 0: no penalty at all. The paper's penalty is
    1 (its rewards are +1 and -1); ours is configurable, for rewards on another scale.
    """
    lengths = np.asarray(lengths, np.float64)
    if buffer_tokens <= 0:
        return np.zeros_like(lengths)
    over = (lengths - (max_tokens - buffer_tokens)) / buffer_tokens
    return -penalty * np.clip(over, 0.0, 1.0)


def kl_in_reward(rewards: Numbers, kl_sums: Numbers, coef: float) -> np.ndarray:
    """r_i - coef * KL_i, with KL_i = sum over t of k1 = log pi_old(x_t) - log pi_ref(x_t): f64[G].

    RLOO (arXiv 2402.14740, section 2) and REINFORCE++ (2501.03262) penalize the reward this way. The penalty is the
    whole response's, given to the sample (not token by token from t on): every token of a sample has one advantage.
    ``kl_sums``: ``algos.batch.reward_kl``.
    """
    return np.asarray(rewards, np.float64) - coef * np.asarray(kl_sums, np.float64)
