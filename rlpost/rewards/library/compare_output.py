"""Compares a program's output as contest judges do: line by line, ignoring spaces at the ends of lines.

Pure functions on the host; the program never sees the expected output.
"""

from __future__ import annotations

import math


def same_output(written: bytes, expected: str, *, float_tolerance: float | None = None) -> bool:
    """Whether the lines agree, ignoring trailing spaces and empty lines at the end.

    Args:
        float_tolerance: if lines differ, words that are numbers agree within this, absolute or relative to the
            expected number; None: compare text only.
    """
    given, wanted = _lines(written.decode("utf-8", "surrogateescape")), _lines(expected)
    if given == wanted:
        return True
    if float_tolerance is None or len(given) != len(wanted):
        return False
    return all(_same_line(a, b, float_tolerance) for a, b in zip(given, wanted, strict=True))


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_line(given: str, wanted: str, tolerance: float) -> bool:
    words, others = given.split(), wanted.split()
    return len(words) == len(others) and all(_same_word(a, b, tolerance) for a, b in zip(words, others, strict=True))


def _same_word(given: str, wanted: str, tolerance: float) -> bool:
    if given == wanted:
        return True
    try:
        a, b = float(given), float(wanted)
    except ValueError:
        return False
    # NaN and infinity only match if they are written exactly as expected, which was compared above.
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(b))
