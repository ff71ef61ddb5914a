"""Accuracy with its uncertainty: mean@k, pass@k, bootstrap intervals over problems, t over runs. Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

BOOTSTRAP_DRAWS = 2000

# Student's t, 97.5 % quantile, by degrees of freedom from 1: what a two-sided 95 % interval takes. A table, since
# nothing among the dependencies provides the distribution; tests integrate its density.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its two-sided 95 % interval: percentile bootstrap over problems, or Student's t over runs."""

    mean: float
    low: float
    high: float


def bootstrap_mean(per_problem: np.ndarray, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> Interval:
    """Mean of f64[n] with a 95 % interval. Resamples problems, not samples: those of one problem stay together."""
    if len(per_problem) == 0:
        raise ValueError("no problems to average over")
    rng = np.random.default_rng(seed)
    means = per_problem[rng.integers(0, len(per_problem), (draws, len(per_problem)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=float(per_problem.mean()), low=float(low), high=float(high))


def paired_difference(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean of after - before on the same problems, f64[n] each, with its interval."""
    if before.shape != after.shape:
        raise ValueError(f"paired problems: got {before.shape} and {after.shape}")
    return bootstrap_mean(after - before, seed=seed)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of 2 to 21 independent values, such as one per seed, +- t(0.975, n - 1) x s / sqrt(n).

    s is the sample standard deviation (n - 1 below the sum of squares).
    """
    n = len(values)
    if not 2 <= n <= len(T_975) + 1:
        raise ValueError(f"values: got {n}; expected 2 to {len(T_975) + 1}")
    mean = float(np.mean(values))
    half = T_975[n - 2] * float(np.std(values, ddof=1)) / n**0.5
    return Interval(mean=mean, low=mean - half, high=mean + half)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct), from c correct of n (arXiv 2107.03374, eq. 1)."""
    if not 0 < k <= num_samples:
        raise ValueError(f"k: got {k}; expected 1 to the number of samples, {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
