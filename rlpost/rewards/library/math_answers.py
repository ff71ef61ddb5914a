r"""The ``math`` reward: is the final answer of a response mathematically equal to the reference?

The answer is what a recipe's ``pattern`` finds, else the content of the last ``\boxed{}`` (braces balanced), else what
follows the last ``####``. Plain numbers are compared exactly, words as words; everything else goes through math-verify
(LaTeX, expressions, percentages, sets, intervals), whose comparison can take forever: its own timeouts need the main
thread's signals and are off; the worker's deadline replaces them. So this reward runs in a worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.compare_values import differ
from rlpost.rewards.library.math_text import to_latex
from rlpost.rewards.library.read_numbers import PERCENT, Number, read_decimal, same_number
from rlpost.rewards.values import bad_reference, read_golds

MAX_ANSWER_CHARS = 1000  # a longer "answer" does not count as one; parsing it could take minutes
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PERCENT = re.compile(rf"\s*(?:{PERCENT}|\\text\{{\s*{PERCENT}\s*\}})\s*$", re.IGNORECASE)
CLOCK = re.compile(r"(?:\\text\{)?(\d{1,2}:\d{2}(?::\d{2})?)\s*(?:\\text\{)?\s*([ap])\.?\s?m\.?\s*\}?", re.IGNORECASE)
WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")
INTERVAL = re.compile(r"\\infty|[\[\]]")
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer's text without its wrapping, and whether it was a percentage."""

    text: str
    percent: bool = False


def math_answer(
    response: str, *, reference: Any, pattern: str | None = None, format_reward: float = 0.0, **_: Any
) -> dict[str, float]:
    r"""1 if the marked answer equals the reference's, else 0; a response without a marked answer is incorrect.

    ``pattern`` is a regular expression whose last match marks the answer, by its first group if it has one.
    ``format_reward`` is added if an answer is marked. Parts: ``reward``, ``accuracy``, ``format``.

    Raises RewardFailure: ``bad_reference`` for a reference without an answer, ``verify_error`` if the comparison itself
    fails.
    """
    golds = [read_gold(gold, pattern) for gold in read_golds(reference)]
    given = find_answer(response, pattern)
    accuracy = float(given is not None and any(is_equal(gold, given) for gold in golds))
    marked = float(given is not None)
    return {"reward": accuracy + format_reward * marked, "accuracy": accuracy, "format": marked}


def read_gold(text: str, pattern: str | None) -> str:
    """The answer marked in a reference, or all of it. Raises RewardFailure where nothing could equal it."""
    marked = find_answer(text, pattern)
    gold = text if marked is None else marked
    if len(gold) > MAX_ANSWER_CHARS:
        raise bad_reference(text, f"an answer of at most {MAX_ANSWER_CHARS} characters")
    plain = strip_wrapping(gold).text
    if not plain or not (read_decimal(plain) is not None or is_words(plain) or parse(plain)):
        raise bad_reference(text, "an answer that can be read as a number, a word or mathematics")
    return gold


math_answer.version = f"math-verify {version('math-verify')}, sympy {version('sympy')}"  # type: ignore[attr-defined]


# -- finding the answer --------------------------------------------------------------------------------------------


def find_answer(text: str, pattern: str | None = None) -> str | None:
    r"""The marked answer: by ``pattern`` if given, else the last ``\boxed{}``, else after the last ``####``."""
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        if matches:
            last = matches[-1]
            return (last.group(1) if last.re.groups else last.group()) or ""
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed
    _, marker, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if marker else None


def find_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``; ``\{`` and ``\}`` do not count as braces."""
    for start in reversed(list(BOX.finditer(text))):
        depth, position = 1, start.end()
        while position < len(text) and depth:
            if text[position] == "\\":
                position += 1
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
            position += 1
        if not depth:
            return text[start.end() : position - 1]
    return None


# -- comparing -----------------------------------------------------------------------------------------------------


def is_equal(gold: str, given: str) -> bool:
    """Whether two answers are the same; not symmetric if one is an equation (the reference's form counts)."""
    if len(given) > MAX_ANSWER_CHARS:
        return False
    clocks = CLOCK.fullmatch(gold.strip()), CLOCK.fullmatch(given.strip())
    if clocks[0] and clocks[1]:
        return [part.casefold() for part in clocks[0].groups()] == [part.casefold() for part in clocks[1].groups()]
    first, second = strip_wrapping(gold), strip_wrapping(given)
    if not first.text or not second.text:
        return False
    scales = [1] if first.percent == second.percent else [1, 100]  # 50 % is 0.5, and 50 if percent is implied
    wanted, got = read_decimal(first.text), read_decimal(second.text)
    if wanted is not None and got is not None:
        return same_number(Number(wanted, first.percent), Number(got, second.percent))
    if is_words(first.text) or is_words(second.text):
        return as_words(first.text) == as_words(second.text)
    if first.text == second.text and first.percent == second.percent:
        return True
    return any(verify(_scaled(first, scale), _scaled(second, scale)) for scale in scales)


def strip_wrapping(text: str) -> Answer:
    """Removes dollar signs, a final period, LaTeX's spaces, thousands separators and the percent sign."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = to_latex(text)
    text = re.sub(r"^(?:\\?[$€£¥])\s*", "", text.strip().removesuffix(".").strip())
    percent = _PERCENT.search(text)
    return Answer(text=text[: percent.start()] if percent else text, percent=percent is not None)


def is_words(text: str) -> bool:
    """Words such as Monday, not products of letters: three letters or more, or LaTeX text of at least one letter."""
    inner = TEXT.fullmatch(text.strip())
    return bool(WORDS.fullmatch(text.strip())) or bool(inner and re.search(r"[^\W\d_]", inner.group(1)))


def as_words(text: str) -> str:
    return " ".join(TEXT.sub(r"\1", text).replace("{", "").replace("}", "").split()).strip("()").casefold()


def verify(gold: str, given: str) -> bool:
    """math-verify's result. Raises RewardFailure if it cannot decide; may never return."""
    from math_verify import verify as compare

    parsed = parse(gold)
    if not parsed:
        raise RewardFailure("bad_reference", f"cannot be parsed as mathematics: {gold!r}")
    interval = INTERVAL.search(gold) is not None  # then x < 3 may replace it; a point (1, 2) is not an inequality
    given_parsed = list(parse(given))
    try:
        equal = bool(
            compare(
                list(parsed),
                given_parsed,
                timeout_seconds=None,
                raise_on_error=True,
                allow_set_relation_comp=interval,
            )
        )
        return equal and not differ(parsed[0], given_parsed[0])
    except Exception as error:  # sympy's own exceptions, with any base class
        raise RewardFailure("verify_error", f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=4096)  # the samples of a group have one reference
def parse(text: str) -> tuple[Any, ...]:
    """The text as sympy expressions and as text; empty if it cannot be parsed."""
    import logging

    from math_verify import LatexExtractionConfig
    from math_verify import parse as read

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # silences the warning that its timeout is off
    try:
        return tuple(read(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True))
    except Exception:  # noqa: BLE001 - unparsable: reported for a reference, incorrect for a response
        return ()


def _scaled(answer: Answer, scale: int) -> str:
    return f"\\frac{{{answer.text}}}{{100}}" if answer.percent and scale == 100 else answer.text
