"""Compressed pieces of the page: JSON, deflated, as text. The browser inflates each one when it is first viewed."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Blocks:
    """``texts[n]`` is block n: base64 of the zlib format, which a browser's DecompressionStream calls deflate."""

    texts: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts))

    def add(self, value: Any, room: int | None = None) -> int | None:
        """The new block's number; None, and no block, if it would take more than ``room`` bytes."""
        text = encode(value)
        if room is not None and len(text) > room:
            return None
        self.texts.append(text)
        return len(self.texts) - 1


def encode(value: Any) -> str:
    """ASCII only: a lone surrogate has no UTF-8 form. Raises ValueError for NaN, which JSON does not have."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(plain.encode("ascii"), 7)).decode("ascii")
