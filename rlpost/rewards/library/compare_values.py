"""Tells numbers apart that math-verify takes for equal, because it rounds to six decimals or drops what is tiny.

Numbers that are written exactly (no decimal point) are equal where 30 digits agree. Where one has a decimal point, six
decimals decide, as math-verify has it, and below 0.0005 three significant digits besides: 0.000000333 is 1/3000000,
0.0000003 is not. Also for the members of tuples, finite sets, matrices, for the ends of intervals and for ``x = ...``.
sympy is imported by whoever parsed what is compared.
"""

from __future__ import annotations

from typing import Any

DIGITS, EXACT, ROUNDED = 40, 1e-30, 5e-3  # of an evaluation; largest relative differences


def differ(gold: Any, given: Any) -> bool:
    """Whether two parsed answers, equal for math-verify, have numbers that are not."""
    wanted, got = find_values(gold), find_values(given)
    if wanted is None or got is None:
        return False
    return not (_all_among(wanted, got) and _all_among(got, wanted))


def find_values(answer: Any) -> list[Any] | None:
    """The finite numbers an answer is made of; None where it is made of something else."""
    import sympy

    if isinstance(answer, sympy.Eq) and isinstance(answer.lhs, sympy.Symbol):
        return find_values(answer.rhs)
    if isinstance(answer, sympy.Interval):
        return find_values(sympy.Tuple(answer.start, answer.end))
    if isinstance(answer, sympy.MatrixBase):
        return find_values(sympy.Tuple(*answer))
    if isinstance(answer, sympy.Tuple | sympy.FiniteSet):
        found: list[Any] = []
        for member in answer.args:
            values = find_values(member)
            if values is None:
                return None
            found += values
        return found
    if isinstance(answer, sympy.Expr) and not answer.free_symbols and answer.is_finite is not False:
        return [answer]
    return [] if answer in (sympy.oo, -sympy.oo) else None


def _all_among(values: list[Any], others: list[Any]) -> bool:
    return all(any(_agree(value, other) for other in others) for value in values)


def _agree(a: Any, b: Any) -> bool:
    import sympy

    if a == b:
        return True
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    first, second = _evaluate(a), _evaluate(b)
    if first is None or second is None:  # no number after all: nothing tells them apart
        return True
    return bool(abs(first - second) <= (ROUNDED if rounded else EXACT) * max(abs(first), abs(second)))


def _evaluate(value: Any) -> Any:
    import sympy

    number = value.doit().evalf(DIGITS)
    if getattr(number, "_prec", DIGITS) == 1:  # no digit of it is certain: as far as sympy can tell, it is zero
        return sympy.Integer(0)
    return number if number.is_number and number.is_finite else None
