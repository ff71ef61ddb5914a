"""What a reward function's return value means: a number, named parts, no opinion, or a failure. No heavy imports."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.rewards.failures import RewardFailure

MAX_FAILURE_CHARS = 300  # an exception's text may contain the whole response


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One function's result for one response; neither ``reward`` nor ``failure``: it has no opinion."""

    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # "kind: detail", one line


def read_outcome(outcome: Any) -> tuple[float, dict[str, float]]:
    """A reward function's return value as (reward, parts).

    A number is the reward. A mapping holds named parts; its ``reward`` key is the total, else the sum of the parts.

    Raises:
        ValueError: anything else, and numbers that are not finite.
    """
    parts = {str(k): float(v) for k, v in outcome.items()} if isinstance(outcome, Mapping) else {}
    if parts:
        reward = parts.pop("reward", None)
        reward = sum(parts.values()) if reward is None else reward
    elif isinstance(outcome, numbers.Real) or getattr(outcome, "shape", None) == ():  # NumPy's and torch's scalars
        reward = float(outcome)
    else:
        raise ValueError(f"a reward function must return a number or a mapping of parts, got {outcome!r}")
    wrong = {name: value for name, value in {"reward": reward, **parts}.items() if not math.isfinite(value)}
    if wrong:
        raise ValueError(f"a reward must be finite, got {wrong}")
    return reward, parts


def to_outcome(value: Any, *, nan_is_none: bool = False) -> Outcome:
    """Any value that a function may return for one response, including a failure; never raises."""
    if type(value) is float and math.isfinite(value):  # the usual case, decided fast
        return Outcome(reward=value)
    if isinstance(value, BaseException):
        return Outcome(failure=describe_failure(value))
    if value is None or (nan_is_none and isinstance(value, numbers.Real) and math.isnan(value)):
        return Outcome()
    try:
        reward, parts = read_outcome(value)
    except (ValueError, TypeError) as error:
        return Outcome(failure=describe_failure(error))
    return Outcome(reward=reward, parts=parts)


def to_outcomes(values: Any, count: int, *, nan_is_none: bool = False) -> list[Outcome]:
    """What a function of a group returned: one value for each of its ``count`` responses."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence) or len(values) != count:
        error = ValueError(f"a reward function of a group must return a list of {count}, got {values!r}")
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
