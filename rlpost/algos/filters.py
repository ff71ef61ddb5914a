"""Which complete groups may train. ``fn(group) -> reason | None``: None admits, a reason rejects and is counted.

Filters read the unshaped reward. Called by ``rollout.collect`` through ``Algorithm.reject``, after scoring.
"""

from __future__ import annotations

from rlpost.types import Group


def none(group: Group) -> str | None:
    """Every group is admitted, even one without any reward (it trains nothing, and is counted as failed)."""
    return None


def dynamic_sampling(group: Group) -> str | None:
    """DAPO (arXiv 2503.14476, eq. 11): reject groups whose rewards are all equal, since they have no gradient.

    Difference: the paper counts correct answers (0 < correct < G); this compares rewards, which is equivalent for
    binary ones and extends to graded ones. A group with fewer than two rewards has nothing to compare.
    """
    rewards = {sample.reward for sample in group.scored}
    if not rewards:
        return "no_reward"
    return "equal_rewards" if len(rewards) == 1 else None
