"""How many tokens a sample still has before it, from the lengths seen so far, its own age and its siblings.

*Marginal.* Lengths of complete groups, and the ages of responses that are not finished, give the product-limit estimate
of the length distribution (Kaplan and Meier 1958, eq. 2b): a response of age a says that its length is above a, no
more. Leaving those out would make the first steps, in which short answers are done, predict short answers. What the
estimate leaves open above the longest observation is put at the cap. The mean residual life is
``m(a) = E[L - a | L > a]``.

*Siblings.* Log lengths are taken as a group's part plus a sample's part with intraclass correlation rho (one-way random
effects; moment estimate from the mean squares between and within complete groups). A sibling of known length is one
observation. Of one that is not finished, ``E[log L | L > age]`` stands for the length (Buckley and James 1979, eq. 2.3)
with the weight F(age), the share of responses that are done by that age: a sibling just begun says nothing. With n the
sum of weights and d the weighted mean distance from the marginal mean mu of log L, the best linear prediction
(Henderson 1975) is

    E[log L | siblings] = mu + B d,    B = n rho / (1 + (n - 1) rho)                                              (1)
    Var[log L | siblings] = (1 - rho B) Var[log L]                                                                (2)

so the estimate is the mean residual life of the marginal distribution moved by B d and narrowed by sqrt(1 - rho B), on
the log scale. Without correlation, or without a sibling that tells anything, it is m(a).

Pure: no clock, no random numbers. ``rollout.kv_room`` plans with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


class LengthEstimate:
    """The distribution of response lengths as far as it is known. Lengths and ages in tokens, up to ``cap``.

    Args:
        complete: response lengths of groups that have ended; recent ones only, as lengths drift with the policy.
        unfinished: ages of the responses under way.
        cap: the longest response there can be.
    """

    def __init__(self, complete: Iterable[Sequence[int]], unfinished: Iterable[int], *, cap: int) -> None:
        self.cap = cap
        groups = [[max(1, n) for n in lengths] for lengths in complete if lengths]
        finished = [n for lengths in groups for n in lengths]
        self.is_known = bool(finished)
        self._lengths, self._mass = product_limit(finished, [a for a in unfinished if a > 0], cap=cap)
        self._logs = np.log(self._lengths)
        self._mu = float((self._mass * self._logs).sum())
        self._below = [0.0, *np.minimum(1.0, np.cumsum(self._mass)).tolist()]
        self._logs_above = [*np.cumsum((self._mass * self._logs)[::-1])[::-1].tolist(), 0.0]
        self._rho = intraclass_correlation([[math.log(n) for n in lengths] for lengths in groups])

    @property
    def correlation(self) -> float:
        """rho, of log lengths within a group; 0 to 1."""
        return self._rho

    def remaining(self, age: int, *, finished: Sequence[int] = (), ages: Sequence[int] = ()) -> float:
        """Tokens that a response of ``age`` tokens still has before it, expected; 0 to ``cap - age``.

        Args:
            finished: lengths of the siblings that are done.
            ages: tokens so far of those that are not.
        """
        shift, narrow = self._siblings(finished, ages)
        lengths = np.minimum(self.cap, np.exp(self._mu + shift + narrow * (self._logs - self._mu)))
        left = lengths >= age + 0.5  # lengths are whole numbers before they are moved
        mass = float(self._mass[left].sum())
        if mass <= 0:  # older than anything that seems possible: between now and the cap nothing is known
            return (self.cap - age) / 2
        return float((self._mass[left] * lengths[left]).sum()) / mass - age

    def ages(self) -> tuple[float, float]:
        """(mean, standard deviation) over time of the tokens so far in a slot that is always refilled: those of the
        age in a renewal process, ``E[L^2] / (2 E[L])`` and from ``E[L^3] / (3 E[L])``."""
        first, second, third = (float((self._mass * self._lengths**k).sum()) for k in (1, 2, 3))
        mean = second / (2 * first)
        return mean, math.sqrt(max(0.0, third / (3 * first) - mean**2))

    # ---- private

    def _siblings(self, finished: Sequence[int], ages: Sequence[int]) -> tuple[float, float]:
        """(B d, sqrt(1 - rho B)) of equations 1 and 2."""
        if not self._rho or not (finished or ages):
            return 0.0, 1.0
        n, total = float(len(finished)), sum(math.log(max(1, length)) - self._mu for length in finished)
        for age in ages:
            above = int(np.searchsorted(self._lengths, age, side="right"))
            weight = self._below[above]
            if weight:
                n += weight
                total += weight * (self._mean_log_above(above, age) - self._mu)
        if not n:
            return 0.0, 1.0
        blend = n * self._rho / (1 + (n - 1) * self._rho)
        return blend * total / n, math.sqrt(1 - self._rho * blend)

    def _mean_log_above(self, above: int, age: int) -> float:
        """``E[log L | L > age]``; ``above``: the first atom above it."""
        mass = 1.0 - self._below[above]
        return self._logs_above[above] / mass if mass > 0 else math.log(age)


def product_limit(finished: Sequence[int], unfinished: Sequence[int], *, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of the length distribution: f64[n] lengths, rising, and their f64[n] mass, which sums to 1.

    Kaplan and Meier 1958, eq. 2b: S(t) is the product over lengths u <= t of 1 - (responses that end at u) / (responses
    with a length or age of at least u). The mass left above the longest observation lies at ``cap``; with no
    observation, all of it.
    """
    lengths, ends = np.unique(np.asarray(finished, np.int64), return_counts=True)
    everyone = np.sort(np.concatenate([np.asarray(finished, np.int64), np.asarray(unfinished, np.int64)]))
    at_risk = len(everyone) - np.searchsorted(everyone, lengths, side="left")
    survival = np.concatenate([[1.0], np.cumprod(1.0 - ends / np.maximum(1, at_risk))])
    mass = survival[:-1] - survival[1:]
    if survival[-1] > 0:
        if len(lengths) and lengths[-1] == cap:
            mass[-1] += survival[-1]
        else:
            lengths, mass = np.append(lengths, cap), np.append(mass, survival[-1])
    return lengths.astype(np.float64), mass


def intraclass_correlation(groups: Sequence[Sequence[float]]) -> float:
    """Moment estimate of one-way random effects: ``(MSB - MSW) / (MSB + (n0 - 1) MSW)``, cut to 0..1 (Fisher 1925; with
    n0 for groups of different sizes as in Donner 1986, eq. 2.3). 0 where two groups of two are not there."""
    groups = [g for g in groups if len(g) > 1]
    sizes = [len(g) for g in groups]
    total, k = sum(sizes), len(groups)
    if k < 2:
        return 0.0
    means = [sum(g) / len(g) for g in groups]
    grand = sum(sum(g) for g in groups) / total
    between = sum(n * (m - grand) ** 2 for n, m in zip(sizes, means, strict=True)) / (k - 1)
    within = sum((x - m) ** 2 for g, m in zip(groups, means, strict=True) for x in g) / (total - k)
    n0 = (total - sum(n * n for n in sizes) / total) / (k - 1)
    spread = between + (n0 - 1) * within
    return min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else 0.0
