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
_SEPARATORS = re.compile(rf"[,{_SPACE}]")
_Found = tuple[re.Match[str], bool]  # of DECIMAL or FRACTION, and whether a percent sign follows


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    percent: bool = False  # followed by a percent sign; ``value`` is what stands before it


def read_decimal(text: str) -> Fraction | None:
    """The whole text as a decimal number, exactly; None for anything else."""
    match = DECIMAL.fullmatch(text.strip())
    return _to_decimal(match) if match else None


def first_number(text: str) -> Number | None:
    """What looks like a number and is too long, or divides by zero, is passed over."""
    return next((number for found in _find(text) if (number := _to_number(found)) is not None), None)


def last_number(text: str) -> Number | None:
    """The same from the end."""
    return next((number for found in reversed([*_find(text)]) if (number := _to_number(found)) is not None), None)


def same_number(gold: Number, given: Number) -> bool:
    """50 % is 0.5, and also 50, since many references leave the sign out; 5 % is not 500 %."""
    larger, smaller = (gold.value, given.value) if gold.percent else (given.value, gold.value)
    return larger == smaller or (gold.percent != given.percent and larger == 100 * smaller)


def _find(text: str) -> Iterator[_Found]:
    """What looks like a number, in order, not yet converted: a response may hold thousands."""
    position = 0
    while start := _START.search(text, position):
        match = FRACTION.match(text, start.start())
        if match and match["whole"] and not _is_proper(*_parts(match)):
            match = None
        match = match or DECIMAL.match(text, start.start())
        if match is None:  # \frac of something else
            position = start.end()
            continue
        percent = _PERCENT.match(text, match.end())
        yield match, percent is not None
        position = percent.end() if percent else match.end()


def _to_number(found: _Found) -> Number | None:
    match, percent = found
    value = _to_decimal(match) if match.re is DECIMAL else _to_fraction(match)
    return None if value is None else Number(value, percent)


def _parts(fraction: re.Match[str]) -> tuple[str, str]:
    """Numerator and denominator."""
    return fraction["over"] or fraction["over_tex"], fraction["under"] or fraction["under_tex"]


def _is_proper(over: str, under: str) -> bool:
    """As the fraction of a mixed number is: 2 4/3 is no number."""
    return len(under) <= 4 and len(over) <= 4 and 0 < int(over) < int(under)


def _to_fraction(match: re.Match[str]) -> Fraction | None:
    (over, under), whole = _parts(match), match["whole"] or "0"
    if max(map(len, (whole, over, under))) > MAX_DIGITS or not under.strip("0"):
        return None
    return _signed(_to_exact(whole) + _to_exact(over) / _to_exact(under), match["sign"])


def _to_decimal(match: re.Match[str]) -> Fraction | None:
    digits = _SEPARATORS.sub("", match["digits"])
    exponent = (match["e"] or match["ten"] or "").replace(MINUS, "-")
    if len(digits) > MAX_DIGITS or len(exponent) > 6 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    return _signed(_to_exact(digits) * Fraction(10) ** int(exponent) if exponent else _to_exact(digits), match["sign"])


def _to_exact(digits: str) -> Fraction:
    """Of decimal digits, a point among them allowed."""
    return Fraction(Decimal(digits))  # int() refuses more than 4,300 digits


def _signed(value: Fraction, sign: str) -> Fraction:
    return value if sign in ("", "+") else -value
