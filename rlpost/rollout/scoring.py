"""Judging finished samples: turns tokens into text, calls the reward, and makes every outcome a counted fact.

``collect`` and ``evaluate`` submit samples and poll verdicts; a verdict is a number or a named failure, never a
silent zero. :class:`InlineScorer` runs the reward in the caller's process, for rewards that take microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlpost.types import Prompt

RewardFunction = Callable[
    ..., Any
]  # (response, *, prompt, reference, finish_reason, columns) -> float | dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``reward`` is None exactly where ``failure`` says why."""

    uid: str
    index: int
    reward: float | None
    parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


class Scorer(Protocol):
    def submit(self, prompt: Prompt, index: int, token_ids: np.ndarray, finish_reason: str) -> None: ...

    def poll(self) -> Sequence[Verdict]:
        """Verdicts that arrived since the last call; never blocks."""

    @property
    def num_pending(self) -> int:
        """Samples submitted whose verdict was not polled yet."""

    def wait(self, timeout_s: float) -> None:
        """Block until a verdict can be polled, at most ``timeout_s``."""

    def close(self) -> None: ...


class InlineScorer:
    """Calls ``function`` at submission. ``decode`` maps the response's token ids to text, end token left out."""

    def __init__(self, function: RewardFunction, decode: Callable[[Sequence[int]], str]) -> None:
        self._function = function
        self._decode = decode
        self._verdicts: list[Verdict] = []

    def submit(self, prompt: Prompt, index: int, token_ids: np.ndarray, finish_reason: str) -> None:
        self._verdicts.append(self._judge(prompt, index, token_ids, finish_reason))

    def poll(self) -> Sequence[Verdict]:
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    @property
    def num_pending(self) -> int:
        return len(self._verdicts)

    def wait(self, timeout_s: float) -> None:
        return None

    def close(self) -> None:
        return None

    def _judge(self, prompt: Prompt, index: int, token_ids: np.ndarray, finish_reason: str) -> Verdict:
        try:
            outcome = self._function(
                self._decode(token_ids.tolist()),
                prompt=prompt.text,
                reference=prompt.reference,
                finish_reason=finish_reason,
                columns=prompt.columns,
            )
            reward, parts = read_outcome(outcome)
        # A user's function may raise anything, and code it runs may call exit(): data that metrics count.
        except (Exception, SystemExit) as error:
            failure = f"reward_error: {type(error).__name__}: {' '.join(str(error).split())}"
            return Verdict(uid=prompt.uid, index=index, reward=None, failure=failure)
        return Verdict(uid=prompt.uid, index=index, reward=reward, parts=parts)


def read_outcome(outcome: Any) -> tuple[float, dict[str, float]]:
    """A reward function's return value as (reward, parts).

    A number is the reward. A mapping holds named parts; its ``reward`` key is the total, else the parts' sum.

    Raises:
        ValueError: anything else, and numbers that are not finite.
    """
    parts = {str(k): float(v) for k, v in outcome.items()} if isinstance(outcome, Mapping) else {}
    if parts:
        reward = parts.pop("reward", None)
        reward = sum(parts.values()) if reward is None else reward
    elif isinstance(outcome, (bool, int, float, np.floating, np.integer, np.bool_)):
        reward = float(outcome)
    else:
        raise ValueError(f"a reward function must return a number or a mapping of parts, got {outcome!r}")
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite, got {reward!r}")
    return reward, parts


def make_decode(tokenizer: Any, end_ids: Sequence[int]) -> Callable[[Sequence[int]], str]:
    """Token ids to text without the tokens that end a response."""
    ends = frozenset(end_ids)

    def decode(token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        while ids and ids[-1] in ends:
            ids.pop()
        return tokenizer.decode(ids, skip_special_tokens=True)

    return decode
