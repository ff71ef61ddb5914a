"""Rewards that compare a final answer with the reference, and one that varies for any model.

Called by the scorer; they never raise on any response text, but do on a reference they cannot read (a data error).
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_answer(response: str, *, reference: str, marker: str = "#", **_: Any) -> dict[str, float]:
    """1 if the text after the last ``marker`` equals the reference exactly, else 0; also whether work was shown.

    Parts: ``reward`` and ``accuracy`` (0 or 1), ``shows_work`` (1 if there is text before the marker; not rewarded).
    """
    work, found, answer = response.rpartition(marker)
    correct = float(bool(found) and answer.strip() == str(reference).strip())
    return {"reward": correct, "accuracy": correct, "shows_work": float(bool(found) and bool(work.strip()))}


def gsm8k(response: str, *, reference: str, format_reward: float = 0.0, **_: Any) -> dict[str, float]:
    """GSM8K: the number after ``####`` (else the last number) equals the reference, ignoring commas and trailing zeros.

    ``format_reward`` is added if the response uses the marker. Parts: ``reward``, ``accuracy``, ``format``.
    """
    gold = _read_number(str(reference).rpartition("####")[2])
    if gold is None:
        raise ValueError(f"no number in the reference {reference!r}")
    marked = "####" in response
    given = _read_number(response.rpartition("####")[2]) if marked else _last_number(response)
    accuracy = float(given is not None and given == gold)
    return {"reward": accuracy + format_reward * marked, "accuracy": accuracy, "format": float(marked)}


def last_number(response: str, *, reference: str, **_: Any) -> float:
    """1 if the last number in the response equals the reference."""
    gold = _read_number(str(reference))
    if gold is None:
        raise ValueError(f"no number in the reference {reference!r}")
    return float(_last_number(response) == gold)


def format_match(response: str, *, pattern: str, **_: Any) -> float:
    """1 if the regular expression ``pattern`` matches the whole response (``.`` also matches newlines), else 0."""
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def digit_share(response: str, **_: Any) -> float:
    """The share of characters that are digits: varies for any model, so pipelines can be tried on random weights."""
    return sum(c.isdigit() for c in response) / len(response) if response else 0.0


def _read_number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    return _to_decimal(match.group()) if match else None


def _last_number(text: str) -> Decimal | None:
    matches = _NUMBER.findall(text)
    return _to_decimal(matches[-1]) if matches else None


def _to_decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
