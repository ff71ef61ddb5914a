"""The values a key of the configuration may have: one rule beside each schema field that has bounds or options.

Owns the decision whether a value is valid and the words for what is expected; error messages, ``rlpost config --keys``
and docs/configuration.md all use it. Does not know which keys exist (``rlpost.config.schema`` does), nor the names of
an algorithm's parts and of rewards: such a rule only names their table. Rules about several keys are functions in
``rlpost.preflight.check_values``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rlpost.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one value may be. None is always valid here: the schema's type decides whether it is allowed."""

    choices: tuple[Any, ...] = ()
    low: float | None = None  # inclusive
    above: float | None = None  # exclusive
    high: float | None = None  # inclusive
    below: float | None = None  # exclusive
    finite: bool = False  # any number; implied by a bound
    length: int | None = None  # of a list of numbers, each within the bounds
    table: str = ""  # the table of parts whose names are the choices; the owner of the table looks them up
    do: str = ""  # what to do about an invalid value, if there is more to say than to choose another

    @property
    def expected(self) -> str:
        """For example ``one of auto, cpu, cuda``, ``> 0 and <= 1`` or ``a finite number``."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        bounds = self._bounds() or ("a finite number" if self.finite else "")
        return bounds if self.length is None else f"{self.length} numbers, each {bounds}"

    def holds(self, value: Any) -> bool:
        if value is None:
            return True
        if self.choices:
            return value in self.choices and not isinstance(value, bool)  # True == 1
        if self.length is not None:
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            return is_list and len(value) == self.length and all(map(self._is_within, value))
        return not (self.finite or self._bounds()) or self._is_within(value)

    def explain(self, key: str, got: Any) -> str:
        """One line in the house form, for an invalid value of ``key``."""
        expected, bounds = self.expected, self._bounds()
        if bounds and _is_number(got) and not _is_finite(got):
            expected = f"a finite number {bounds}"
        return explain(key, got, expected, self.do or ("choose one" if self.choices else _see(key)))

    def _bounds(self) -> str:
        signs = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        return " and ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)

    def _is_within(self, value: Any) -> bool:
        return (
            _is_number(value)
            and _is_finite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def check_value(key: str, got: Any, rule: Rule | None) -> None:
    """Raises ConfigError if ``got``, the value of ``key``, is invalid. Names in a table are not looked up."""
    if rule is not None and not rule.holds(got):
        raise ConfigError(rule.explain(key, got))


def _see(key: str) -> str:
    return f"see `rlpost config --keys {key}`"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return value == value and abs(value) != float("inf")
