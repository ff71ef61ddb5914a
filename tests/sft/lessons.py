"""Lessons for the tests: the same ones whenever they are begun."""

from __future__ import annotations

from collections.abc import Iterator


def count(step: int = 1) -> Iterator[dict[str, str]]:
    number = 0
    while True:
        number += step
        yield {"prompt": f"{number}+1=", "response": str(number + 1) * (1 + number % 4)}
