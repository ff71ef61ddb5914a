"""The exception with which a reward reports that it cannot score. Raised by rewards, handled by their callers."""

from __future__ import annotations


class RewardFailure(Exception):
    """No reward result is possible: counted under ``kind``, never a reward of 0.

    ``kind`` is a short snake_case word that becomes part of a metric name (``reward/failed/KIND``); ``detail`` is for
    people.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
