"""What a reward function's return value means: a number, named parts, no opinion, or a failure. No heavy imports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.values import read_number, read_outcome, shown

MAX_FAILURE_CHARS = 300  # an exception's text may contain the whole response


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One function's result for one response; neither ``reward`` nor ``failure``: it has no opinion."""

    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # "kind: detail", one line


def to_outcome(value: Any, *, nan_is_none: bool = False) -> Outcome:
    """Any value that a function may return for one response, including a failure; never raises."""
    if type(value) is float and math.isfinite(value):  # the usual case, decided fast
        return Outcome(reward=value)
    if isinstance(value, BaseException):
        return Outcome(failure=describe_failure(value))
    if value is None:
        return Outcome()
    try:
        if nan_is_none and not isinstance(value, Mapping) and math.isnan(read_number(value)):
            return Outcome()
        reward, parts = read_outcome(value)
    except Exception as error:  # noqa: BLE001 - a value's own methods may raise anything
        return Outcome(failure=describe_failure(error))
    return Outcome(reward=reward, parts=parts)


def to_outcomes(values: Any, count: int, *, nan_is_none: bool = False) -> list[Outcome]:
    """What a function of a group returned: one value for each of its ``count`` responses."""
    try:
        values = values.tolist() if hasattr(values, "tolist") else values
    except Exception as raised:  # noqa: BLE001 - as above
        return [to_outcome(raised)] * count
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence) or len(values) != count:
        error = ValueError(f"a reward function of a group must return a list of {count}, got {shown(values)}")
        return [to_outcome(error)] * count
    return [to_outcome(value, nan_is_none=nan_is_none) for value in values]


def describe_failure(error: BaseException) -> str:
    """``kind: detail`` on one line; exceptions that name no kind count as ``reward_error``."""
    if isinstance(error, RewardFailure):
        kind = re.sub(r"[^a-z0-9_]+", "_", error.kind.lower()).strip("_") or "reward_error"
        return shorten(f"{kind}: {error.detail}" if error.detail else kind)
    return shorten(f"reward_error: {type(error).__name__}: {error}")


def shorten(text: str) -> str:
    """One line, short enough for a log."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_FAILURE_CHARS else line[: MAX_FAILURE_CHARS - 3] + "..."
