"""Accuracy with its uncertainty: mean@k, pass@k, bootstrap intervals over problems, paired differences. Pure NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % percentile-bootstrap interval over problems."""

    mean: float
    low: float
    high: float


def bootstrap_mean(per_problem: np.ndarray, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> Interval:
    """Mean of f64[n] with a 95 % interval; problems are resampled, not samples: those of one problem go together."""
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


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right at least, from n of which c are (arXiv 2107.03374, eq. 1)."""
    if not 0 < k <= num_samples:
        raise ValueError(f"k: got {k}; expected 1 to the number of samples, {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
