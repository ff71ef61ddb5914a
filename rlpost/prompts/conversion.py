"""What the values of a data row become, and what is refused: the home of that policy (docs/data-and-rewards.md), for
messages together with ``prompts.messages``.

Every value either has a defined meaning or is a DataError of one line that names the row: nothing is turned into text
by ``str()``, so no Python notation gets into a prompt, and nothing vanishes. Pure; called by whatever reads rows,
columns, messages, templates and references in ``prompts``.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
import pathlib
import string
import uuid
from _string import formatter_field_name_split  # type: ignore[import-not-found]  # what string.Formatter itself uses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlpost.errors import DataError

# Values without a form in JSON whose text says all of them.
AS_TEXT = (
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
    *(uuid.UUID, pathlib.PurePath, np.datetime64, np.timedelta64),
)
MAX_DEPTH = 100  # of lists and mappings in a column; JSON's own readers and writers stop at about a thousand
MAX_DIGITS = 4300  # of a whole number: what Python reads and writes as text

# -- columns -------------------------------------------------------------------------------------------------------


def plain_columns(columns: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A row's columns by :func:`plain_value`. Raises DataError with the row and the column."""
    return {_plain_key(name, origin): plain_value(value, f"{origin}: column {name}") for name, value in columns.items()}


def plain_value(value: Any, what: str, depth: int = 0) -> Any:
    """``value`` as JSON gives it back: text, numbers, booleans, None, lists, and mappings with text as keys.

    NumPy's numbers and arrays become plain ones, tuples lists; dates, decimals, paths and UUIDs become their text.
    ``what`` names the value in the DataError for everything else: bytes, images, sets, functions, objects.
    """
    if depth > MAX_DEPTH:
        raise refuse(what, f"more than {MAX_DEPTH} levels", "fewer lists and mappings inside each other", "flatten it")
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return check_text(str.__str__(value), what)  # an enumeration's own str() would give its name
    if isinstance(value, int | np.integer):
        return check_whole_number(int(value), what)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, AS_TEXT):
        return str(value)
    if isinstance(value, Mapping):
        return {_plain_key(key, what): plain_value(item, f"{what}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray) and not value.shape:
        return plain_value(value[()], what, depth)
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_value(item, what, depth + 1) for item in value]
    raise refuse(what, kind_of(value), "a value that JSON has a form for", "leave the column out, or make it text")


def check_text(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise refuse(what, "half a surrogate pair (\\ud800 to \\udfff)", "Unicode text", "fix the row") from None
    return text


def check_whole_number(number: int, what: str) -> int:
    if number.bit_length() > 4 * MAX_DIGITS or abs(number) >= 10**MAX_DIGITS:
        raise refuse_whole_number(what)
    return number


def refuse_whole_number(what: str) -> DataError:
    got = f"a whole number of more than {MAX_DIGITS:,} digits"
    return refuse(what, got, f"at most {MAX_DIGITS:,} digits", "write it as text, in quotes")


def _plain_key(key: Any, what: str) -> str:
    if isinstance(key, str):
        return check_text(str.__str__(key), what)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise refuse(what, f"{kind_of(key)} as a key", "keys that are text", "rename the key")


# -- template ------------------------------------------------------------------------------------------------------


class TemplateFormatter(string.Formatter):
    """``str.format`` for ``data.template``: what stands in braces must be text or a number in the end.

    Dots reach into a column, as in ``data.prompt_key``; there are no attributes of Python objects.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name in kwargs:  # a column whose name has dots
            return kwargs[field_name], field_name
        first, rest = formatter_field_name_split(field_name)
        value = self.get_value(first, args, kwargs)
        for _, key in rest:
            if isinstance(value, str):
                raise TypeError(f"{field_name} reaches into text")
            value = value[key]
        return value, str(first)

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion is not None:
            raise ValueError(f"!{conversion} writes Python's notation")
        return value

    def format_field(self, value: Any, format_spec: str) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) or is_number) or _is_not_finite(value):
            do = "leave it out of the template, or fix the row"
            raise refuse(self._what, f"{kind_of(value)} in braces", "text or a number", do)
        return super().format_field(value, format_spec)


# -- reference -----------------------------------------------------------------------------------------------------


def is_reference(value: Any) -> bool:
    """Whether a reward can compare with it: null, a number that is none, and what is empty or holds them cannot be
    meant. An empty text is left to the reward."""
    if isinstance(value, Mapping):
        return bool(value)
    if isinstance(value, list | tuple):
        return bool(value) and all(is_reference(item) for item in value)
    return value is not None and not _is_not_finite(value)


def describe_reference(value: Any) -> str:
    """One that :func:`is_reference` refuses, in JSON's words: ``null``, ``a list that holds null``."""
    if isinstance(value, list | tuple) and value:
        return f"a list that holds {next(describe_reference(item) for item in value if not is_reference(item))}"
    return kind_of(value)


# -- words ---------------------------------------------------------------------------------------------------------


def refuse(what: str, got: str, expected: str, do: str) -> DataError:
    return DataError(f"{what}: got {got}; expected {expected}; {do}")


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def is_empty(value: Any) -> bool:
    """What tables write where a row lacks a key: null, or an empty text, list or mapping."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not len(value))


def kind_of(value: Any) -> str:
    """In JSON's words where it has some: ``null``, ``text``, ``an empty list``; else the type's name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number that is not finite" if _is_not_finite(value) else "a number"
    if isinstance(value, str):
        return "text" if value else "empty text"
    if isinstance(value, list | tuple | Mapping):
        noun = "mapping" if isinstance(value, Mapping) else "list"
        return f"a {noun}" if value else f"an empty {noun}"
    return type(value).__name__
