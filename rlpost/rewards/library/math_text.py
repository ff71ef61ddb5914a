r"""Brings the text of a mathematical answer into the LaTeX that math-verify reads.

What people and models write beside LaTeX: Unicode signs (½, √2, x², π, ≤), plain words (``pi``, ``infinity``), mixed
numbers (2 2/3), thousands set apart by spaces, exponents (1.5e-7), quantities in ``\text{}``. Pure functions; both
sides of a comparison pass through them.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from rlpost.rewards.library.read_numbers import MINUS

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
SIGNS = {
    MINUS: "-",
    "\N{FULLWIDTH PERCENT SIGN}": "%",
    "π": "\\pi ",
    "∞": "\\infty ",
    "°": "^\\circ ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "×": "\\times ",
    "÷": "\\div ",
    "±": "\\pm ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∅": "\\emptyset ",
    "∈": "\\in ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "…": "\\ldots ",
}
_SIGNS = re.compile("|".join(map(re.escape, SIGNS)))
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*(?:\{([^{}]*)\}|(\d+(?:\.\d+)?))")
_SUPER = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_SUB = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|~|[\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{HAIR SPACE}]")
_THOUSANDS = re.compile(r"(?<![\d.,^_{])(\d{1,3}(?: \d{3})+)(?![\d/]| */)")
_DECIMALS = re.compile(r"\.\d{3}(?: \d{3})*(?: \d{1,3})(?!\d)")
_MIXED = re.compile(r"(?<![\d.,/^_}\w])(\d+)\s+(\d{1,4})\s*/\s*(\d{1,4})(?![\d./])")
_EXPONENT = re.compile(r"(?<![\d.A-Za-z\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,3})(?![\d.A-Za-z])")
_STARS = re.compile(r"(?<=[\w)}\]])\*\*(?=[\w({\\-])")  # a power in plain text, not bold type
_POWER = re.compile(r"\^(-?\d{2,}|-\d)")
_WORD = re.compile(r"(?<![A-Za-z\\])(pi|infinity|infty|inf|oo)(?![A-Za-z])")
_QUANTITY = re.compile(
    r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*"
    r"\{\s*(\\?\$?[+-]?\d[\d,]*(?:\.\d+)?(?:\s*(?:\\?%|(?!(?:[ap]\.?m\b))[A-Za-z]+(?:[ -][A-Za-z]+)*\.?))?)\s*\}"
)


def to_latex(text: str) -> str:
    text = _SPACES.sub(lambda m: "" if m.group() == "\\!" else " ", from_unicode(text)).replace("{,}", ",")
    text = _QUANTITY.sub(r"\1", " ".join(text.split()))
    text = _MIXED.sub(_improper, text)
    for groups in (_THOUSANDS, _DECIMALS):
        text = groups.sub(lambda m: m.group().replace(" ", ""), text)
    text = _EXPONENT.sub(_positional, text)
    text = _POWER.sub(r"^{\1}", _STARS.sub("^", text))
    text = _PLAIN_ROOT.sub(lambda m: f"\\sqrt{{{m.group(1) or m.group(2)}}}", text)
    text = text.replace("!=", "\\ne ")
    return _WORD.sub(lambda m: "\\pi " if m.group() == "pi" else "\\infty ", text).strip()


def from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPER.sub(lambda m: f"^{{{m.group().translate(SUPERSCRIPTS)}}}", text)
    text = _SUB.sub(lambda m: f"_{{{m.group().translate(SUBSCRIPTS)}}}", text)
    text = re.sub(r"(\d?)([¼-¾⅐-⅞↉])", _vulgar, text)
    text = _ROOT.sub(lambda m: f"{ROOTS[m.group(1)]}{{{m.group(2) or m.group(3) or m.group(4)}}}", text)
    text = re.sub(r"(?<![\w)}])\s*[\N{EN DASH}\N{HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}](?=[\d.\\])", "-", text)
    text = _SIGNS.sub(lambda m: SIGNS[m.group()], text)
    return "".join(unicodedata.normalize("NFKC", c) if 0xFF01 <= ord(c) <= 0xFF5E else c for c in text)


def _vulgar(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match.group(2)).partition("\N{FRACTION SLASH}")
    return f"{match.group(1)} {over}/{under} ".strip() if match.group(1) else f"\\frac{{{over}}}{{{under}}}"


def _improper(match: re.Match[str]) -> str:
    whole, over, under = map(int, match.groups())
    if not 0 < over < under:
        return match.group()
    value = whole + Fraction(over, under)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _positional(match: re.Match[str]) -> str:
    """1.5e-7 as 0.00000015, which stays a decimal number: LaTeX reads e as Euler's number."""
    if abs(int(match.group(2))) > 100:
        return f"{match.group(1)} \\cdot 10^{{{match.group(2)}}}"
    return f"{Decimal(match.group()):f}"
