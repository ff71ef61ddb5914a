"""The accounts behind promise 1: every group drawn and every token received is in exactly one known state.

Counters and the check that they balance. ``rollout.buffer`` updates them; it knows what is still open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rlpost.rollout.open_groups import OpenGroup

REWARD_FAILED = "reward"
RESTARTED, ROLLED_BACK = "discarded[restart]", "discarded[rollback]"


class LedgerError(RuntimeError):
    """The conservation check failed: a group or token is unaccounted for. Always a bug in rlpost."""


class Accounts:
    """What came in and how it ended: trained, rejected[filter], failed[reason]; tokens also as discarded[...]."""

    def __init__(self) -> None:
        self.num_drawn = 0
        self.tokens_received = 0
        self.groups_ended: Counter[str] = Counter()
        self.tokens_ended: Counter[str] = Counter()

    def end(self, group: OpenGroup, end: str) -> int:
        """Count a group that ended as ``end``; returns how many of its tokens are in no batch.

        The tokens of a sample without a reward train nothing: they end as failed even in a trained group.
        """
        unscored = sum(s.num_tokens for s in group.samples if s.reward is None) if end == "trained" else 0
        self.groups_ended[end] += 1
        self.tokens_ended[end] += group.num_tokens - unscored
        if unscored:
            self.tokens_ended[f"failed[{REWARD_FAILED}]"] += unscored
        return unscored

    def restart(self, num_tokens: int) -> None:
        self.tokens_ended[RESTARTED] += num_tokens

    def roll_back(self, num_tokens: int) -> None:
        """Tokens that earlier attempts of this run received and a rollback discarded."""
        self.tokens_received += num_tokens
        if num_tokens:
            self.tokens_ended[ROLLED_BACK] += num_tokens

    def totals(self) -> dict[str, Any]:
        """The counters as JSON values, without what rollbacks discarded: the ledger counts that."""
        return {
            "num_drawn": self.num_drawn,
            "tokens_received": self.tokens_received - self.tokens_ended[ROLLED_BACK],
            "groups_ended": dict(self.groups_ended),
            "tokens_ended": {k: v for k, v in self.tokens_ended.items() if k != ROLLED_BACK},
        }

    def load(self, totals: Mapping[str, Any]) -> None:
        self.num_drawn, self.tokens_received = totals["num_drawn"], totals["tokens_received"]
        self.groups_ended = Counter(totals["groups_ended"])
        self.tokens_ended = Counter(totals["tokens_ended"])

    def check(self, untrained: Iterable[OpenGroup], *, step: int) -> None:
        """Raises LedgerError with the numbers unless both balance. ``untrained``: all groups that have not ended.

        groups: drawn = waiting + in flight + paused + scoring + ready + admitted + trained + rejected + failed.
        tokens: received = held by untrained groups + trained + rejected + failed + discarded.
        """
        untrained = list(untrained)
        groups_known = len(untrained) + sum(self.groups_ended.values())
        held = sum(g.num_tokens for g in untrained)
        tokens_known = held + sum(self.tokens_ended.values())
        if groups_known != self.num_drawn or tokens_known != self.tokens_received:
            states = dict(Counter(g.phase() for g in untrained))
            raise LedgerError(
                f"conservation check failed at step {step}: {self.num_drawn} groups drawn, {groups_known} known "
                f"({states}, {dict(self.groups_ended)}); {self.tokens_received} tokens received, "
                f"{tokens_known} known ({held} held, {dict(self.tokens_ended)})"
            )
