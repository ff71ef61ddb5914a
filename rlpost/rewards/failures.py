"""The failure a reward raises where no verdict is possible."""

from __future__ import annotations


class RewardFailure(Exception):
    """No verdict: ``kind`` is short snake case (``timeout``, ``crash``), ``detail`` is for a person."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
