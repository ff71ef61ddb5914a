r"""Numbers as people and models write them, read exactly.

A number is decimal (thousands in groups of three, also Indian ones), with an exponent (``1e6``, ``6 \times 10^{23}``),
a fraction (``1/2``, ``\frac{1}{2}``), or mixed (``3 1/2``); a sign before it may be U+2212, and ``%`` or a word for it
may follow. Pure functions, linear time; used by the rewards that compare final answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS, MAX_EXPONENT = 20_000, 1_000  # what is longer is no number: reading it exactly could take forever
MINUS = "\N{MINUS SIGN}"
_SPACE = (
    "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"  # as thousands separators; a plain one may part words
)
_GROUPED = rf"\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)|\d{{1,3}}(?:[{_SPACE}]\d{{3}})+(?!\d)"
_UNSIGNED = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
_TEN_TO = rf"\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{{?\s*(?P<ten>[-+{MINUS}]?\d+)\s*\}}?"
_EXPONENT = rf"(?:[eE](?P<e>[-+{MINUS}]?\d+)|{_TEN_TO})?"
DECIMAL = re.compile(rf"(?P<sign>[-+{MINUS}]?)(?P<digits>{_UNSIGNED}){_EXPONENT}")
_FRACTION = (
    r"(?:(?P<over>\d+)\s*[/\N{FRACTION SLASH}]\s*(?P<under>\d+)"
    r"|\\[dt]?frac\s*\{\s*(?P<over_tex>\d+)\s*\}\s*\{\s*(?P<under_tex>\d+)\s*\})"
).replace(r"\N{FRACTION SLASH}", "\N{FRACTION SLASH}")
FRACTION = re.compile(rf"(?P<sign>[-+{MINUS}]?)(?:(?P<whole>\d+)(?:\s+|(?=\\)))?{_FRACTION}")
PERCENT = r"(?:\\?%|per\s?cent(?:age)?s?\b(?!\s+points?)|pct\b)"
_PERCENT = re.compile(rf"\s*{PERCENT}", re.IGNORECASE)
_START = re.compile(rf"[-+{MINUS}]?(?:\d|\.\d|\\[dt]?frac)")


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    percent: bool = False  # followed by a percent sign; ``value`` is what stands before it


def read_decimal(text: str) -> Fraction | None:
    """The whole text as a decimal number, exactly; None for anything else."""
    match = DECIMAL.fullmatch(text.strip())
    return _to_decimal(match) if match else None


def find_numbers(text: str) -> Iterator[Number]:
    """All numbers of the text in order; what looks like one and is too long, or divides by zero, is left out."""
    position = 0
    while start := _START.search(text, position):
        value, position = _read_at(text, start.start())
        percent = _PERCENT.match(text, position)
        if percent:
            position = percent.end()
        if value is not None:
            yield Number(value, percent is not None)


def first_number(text: str) -> Number | None:
    return next(find_numbers(text), None)


def last_number(text: str) -> Number | None:
    last = None
    for last in find_numbers(text):  # noqa: B007
        pass
    return last


def same_number(gold: Number, given: Number) -> bool:
    """50 % is 0.5, and also 50, since many references leave the sign out; 5 % is not 500 %."""
    larger, smaller = (gold.value, given.value) if gold.percent else (given.value, gold.value)
    return larger == smaller or (gold.percent != given.percent and larger == 100 * smaller)


def _read_at(text: str, start: int) -> tuple[Fraction | None, int]:
    """The number that begins there and where it ends."""
    fraction = FRACTION.match(text, start)
    if fraction:
        over, under = (fraction[a] or fraction[b] for a, b in (("over", "over_tex"), ("under", "under_tex")))
        if fraction["whole"] is None or _is_proper(over, under):
            return _to_fraction(fraction["sign"], fraction["whole"], over, under), fraction.end()
    decimal = DECIMAL.match(text, start)
    if decimal:
        return _to_decimal(decimal), decimal.end()
    return None, start + 1  # \frac of something else


def _is_proper(over: str, under: str) -> bool:
    """As the fraction of a mixed number is: 2 4/3 is no number."""
    return len(under) <= 4 and len(over) <= 4 and 0 < int(over) < int(under)


def _to_fraction(sign: str, whole: str | None, over: str, under: str) -> Fraction | None:
    if max(map(len, (whole or "", over, under))) > MAX_DIGITS or not under.strip("0"):
        return None
    value = _to_int(over) / _to_int(under) + (_to_int(whole) if whole else 0)
    return value if sign in ("", "+") else -value


def _to_int(digits: str) -> Fraction:
    return Fraction(Decimal(digits))  # int() refuses more than 4,300 digits


def _to_decimal(match: re.Match[str]) -> Fraction | None:
    digits = re.sub(rf"[,{_SPACE}]", "", match["digits"])
    exponent = (match["e"] or match["ten"] or "0").replace(MINUS, "-")
    if len(digits) > MAX_DIGITS or len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    value = Fraction(Decimal(digits)) * Fraction(10) ** int(exponent)
    return value if match["sign"] in ("", "+") else -value
