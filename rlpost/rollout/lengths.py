"""The distribution of response lengths, from finished responses and the ages of unfinished ones.

An unfinished response of age a only shows that its length is above a. Ignoring those would bias the first steps, in
which only short responses are finished, toward short ones; the product-limit estimate (Kaplan and Meier 1958, eq. 2b)
uses them for exactly what they show. It is correct for responses that all started in one stretch of time, finished or
not, so callers pass those of the groups drawn last. Pure functions; ``rollout.concurrency`` plans with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class LengthEstimate:
    """Lengths and ages in tokens, up to ``cap``.

    Args:
        finished: lengths of finished responses.
        unfinished: tokens so far of unfinished ones, started in the same stretch of time.
        cap: the maximum response length.
    """

    def __init__(self, finished: Sequence[int], unfinished: Sequence[int], *, cap: int) -> None:
        self.is_known = bool(finished)
        self._lengths, self._mass = product_limit(
            [max(1, n) for n in finished], [a for a in unfinished if a > 0], cap=cap
        )

    def ages(self) -> tuple[float, float]:
        """(mean, standard deviation) over time of the tokens so far in a slot that is always refilled: the moments of
        the age in a renewal process, from ``E[L^2] / (2 E[L])`` and ``E[L^3] / (3 E[L])`` (Ross, Introduction to
        Probability Models, section 7.5)."""
        first, second, third = (float((self._mass * self._lengths**k).sum()) for k in (1, 2, 3))
        mean = second / (2 * first)
        return mean, math.sqrt(max(0.0, third / (3 * first) - mean**2))


def product_limit(finished: Sequence[int], unfinished: Sequence[int], *, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of the length distribution: f64[n] lengths, increasing, and their f64[n] mass, which sums to 1.

    S(t) is the product over lengths u <= t of 1 - (responses that end at u) / (responses with a length or age of at
    least u). The mass above the longest observation is placed at ``cap``; without any observation, all of it.
    """
    lengths, ends = np.unique(np.asarray(finished, np.int64), return_counts=True)
    observed = np.sort(np.concatenate([np.asarray(finished, np.int64), np.asarray(unfinished, np.int64)]))
    at_risk = len(observed) - np.searchsorted(observed, lengths, side="left")
    survival = np.concatenate([[1.0], np.cumprod(1.0 - ends / np.maximum(1, at_risk))])
    mass = survival[:-1] - survival[1:]
    if survival[-1] > 0:
        if len(lengths) and lengths[-1] == cap:
            mass[-1] += survival[-1]
        else:
            lengths, mass = np.append(lengths, cap), np.append(mass, survival[-1])
    return lengths.astype(np.float64), mass
