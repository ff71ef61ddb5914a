"""What values mean that users give a reward or get from one: every conversion of a reward's values is made here.

The policy: a value either has one defined meaning, or it is refused by name. Nothing becomes a 0, or text, silently.

=================  ==========================================  =================================================
value              meaning                                     refused
=================  ==========================================  =================================================
what a function    a finite real number of any library         text, even "1.0"; NaN and infinity; lists: a
returns            (booleans are 0 and 1); a mapping of such   failure ``reward_error``
                   numbers by name; None: no opinion
a mapping's total  ``reward``, else ``score``, else the sum    names that are no text: ``reward_error``
                   of all parts
the reference of   text; a number, as decimal text; a list of  null, blank text, an empty list, a mapping,
an answer reward   these: any of them is correct               true/false, NaN: a failure ``bad_reference``
the text of a      all of it, or what follows the thoughts     (an unfinished thought has no answer: empty text)
response           (``reward.text``)
a function's       ``timeout_s``: seconds; ``concurrency``: a  anything else: an error when the function is
attributes         whole number; ``cacheable``,                loaded
                   ``needs_reference``: booleans;
                   ``required_columns``: names
=================  ==========================================  =================================================

Columns of the code rewards are read in ``rewards.library.code``. Pure functions, no heavy imports.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rlpost.rewards.failures import RewardFailure

THOUGHT_START, THOUGHT_END = "<think>", "</think>"
TOTALS = ("reward", "score")  # a mapping's total; the first that is there


# ---- what a function returns -----------------------------------------------------------------------------------------


def read_outcome(value: Any) -> tuple[float, dict[str, float]]:
    """A reward function's return value as (reward, parts).

    A number is the reward. A mapping holds named parts; its total is ``reward``, else ``score``, else the parts' sum.

    Raises ValueError for anything else, and for numbers that are not finite.
    """
    if not isinstance(value, Mapping):
        return _read_finite(value, "a reward function must return a number or a mapping of parts"), {}
    if not value:
        raise ValueError("a reward function must return a number or a mapping of parts, got an empty mapping")
    unnamed = [name for name in value if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"the parts of a reward must be named by text, got {shown(unnamed[0])}")
    parts = {name: _read_finite(part, f"the part {name} of a reward must be a number") for name, part in value.items()}
    total = next((parts.pop(name) for name in TOTALS if name in parts), None)
    reward = sum(parts.values()) if total is None else total
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite, got the sum {reward}")
    return float(reward), parts


def read_number(value: Any) -> float:
    """A real number of any library as a float, NaN and infinity included; ValueError for anything else, text too."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):  # NumPy's and torch's scalars
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal):
        raise ValueError(f"got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("got a number too large for a float") from None


def _read_finite(value: Any, expected: str) -> float:
    try:
        number = read_number(value)
    except ValueError as error:
        raise ValueError(f"{expected}, {error}") from None
    if not math.isfinite(number):
        raise ValueError(f"a reward must be finite: {expected}, got {number}")
    return number


# ---- references ------------------------------------------------------------------------------------------------------


def read_golds(reference: Any) -> tuple[str, ...]:
    """The texts of a reference that count as correct: one, or those of a list, any of which is.

    Raises RewardFailure ``bad_reference`` where there is none, or where a member of a list is unusable.
    """
    golds = reference if isinstance(reference, list | tuple) else [reference]
    if not golds:
        raise bad_reference(reference, "text, a number, or a list of these")
    return tuple(_read_gold(gold, reference) for gold in golds)


def _read_gold(gold: Any, reference: Any) -> str:
    if isinstance(gold, str) and gold.strip():
        return gold
    if isinstance(gold, numbers.Real | Decimal) and not isinstance(gold, bool):
        if isinstance(gold, numbers.Integral):
            return str(Decimal(int(gold)))  # str(int) refuses more than 4,300 digits
        if math.isfinite(gold):
            text = f"{Decimal(repr(float(gold))):f}"  # 1e-07 is 0.0000001, 18.0 is 18
            return text.removesuffix(".0")
    raise bad_reference(reference, "text, a number, or a list of these")


def bad_reference(reference: Any, expected: str) -> RewardFailure:
    return RewardFailure("bad_reference", f"got {shown(reference)}; expected {expected}")


# ---- responses -------------------------------------------------------------------------------------------------------


def answer_text(response: str, *, opens_thought: bool = False) -> str:
    """What follows the last ``</think>``; all of it where nothing was thought; empty while a thought is unfinished.

    ``opens_thought``: the prompt ends in ``<think>``, so the response begins inside a thought.
    """
    thought, ended, answer = response.rpartition(THOUGHT_END)
    unfinished = THOUGHT_START in answer or (opens_thought and not ended)
    return "" if unfinished else answer


# ---- a function's attributes -----------------------------------------------------------------------------------------


def is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def shown(value: Any) -> str:
    """A short form of any value for a message; never raises."""
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - a user's own __repr__, or an integer of more digits than Python writes
        return f"a value of type {type(value).__name__}"
