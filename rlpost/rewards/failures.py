"""The one exception by which a reward says that it cannot judge. Raised by rewards, read where they are called."""

from __future__ import annotations


class RewardFailure(Exception):
    """No verdict is possible: counted under ``kind``, never a reward of 0.

    ``kind`` is a short snake_case word that becomes part of a metric's name (``reward/failed/KIND``); ``detail`` is for
    a person.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
