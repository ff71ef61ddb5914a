"""Rewards that compare a final answer with the reference, and one that varies for any model.

Called in the scorer; never raises on any response text. A reference without an answer is the failure
``bad_reference``; of a list of references any one is correct.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from rlpost.rewards.library.read_numbers import Number, first_number, same_number
from rlpost.rewards.library.read_numbers import last_number as find_last
from rlpost.rewards.values import bad_reference, read_golds

_first_number = lru_cache(maxsize=4096)(first_number)  # a group's references are one


def exact_answer(response: str, *, reference: Any, marker: str = "#", **_: Any) -> dict[str, float]:
    """1 if the text after the last ``marker`` equals the reference exactly, else 0; also whether work was shown.

    Parts: ``reward`` and ``accuracy`` (0 or 1), ``shows_work`` (1 if there is text before the marker; not rewarded).
    """
    golds = [gold.strip() for gold in read_golds(reference)]
    work, found, answer = response.rpartition(marker)
    correct = float(bool(found) and answer.strip() in golds)
    return {"reward": correct, "accuracy": correct, "shows_work": float(bool(found) and bool(work.strip()))}


def gsm8k(response: str, *, reference: Any, format_reward: float = 0.0, **_: Any) -> dict[str, float]:
    """GSM8K: the number after ``####`` (else the last number) equals the reference's, however
    they are written (``read_numbers``).

    ``format_reward`` is added if the response uses the marker. Parts: ``reward``, ``accuracy``, ``format``.
    """
    golds = [_gold_number(gold.rpartition("####")[2], reference) for gold in read_golds(reference)]
    marked = "####" in response
    given = first_number(response.rpartition("####")[2]) if marked else find_last(response)
    accuracy = float(given is not None and any(same_number(gold, given) for gold in golds))
    return {"reward": accuracy + format_reward * marked, "accuracy": accuracy, "format": float(marked)}


def last_number(response: str, *, reference: Any, **_: Any) -> float:
    """1 if the last number of the response equals the reference."""
    golds = [_gold_number(gold, reference) for gold in read_golds(reference)]
    given = find_last(response)
    return float(given is not None and any(same_number(gold, given) for gold in golds))


def format_match(response: str, *, pattern: str, **_: Any) -> float:
    """1 if the regular expression ``pattern`` matches the whole response (``.`` also matches newlines), else 0."""
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def digit_share(response: str, **_: Any) -> float:
    """The share of characters that are digits: varies for any model, so pipelines can be tried on random weights."""
    return sum(c.isdigit() for c in response) / len(response) if response else 0.0


def _gold_number(text: str, reference: Any) -> Number:
    number = _first_number(text)
    if number is None:
        raise bad_reference(reference, "a number in it")
    return number
