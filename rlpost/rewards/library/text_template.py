"""A text with ``{prompt}``, ``{response}``, ``{reference}`` and columns in braces, for the rewards that ask a model.

The rules are those of ``data.template``: what stands in braces is text or a number in the end, dots reach into a
column, other braces are doubled.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.config.locations import expand_home
from rlpost.errors import ConfigError, DataError, explain
from rlpost.prompts.conversion import TemplateFormatter
from rlpost.rewards.failures import RewardFailure

OWN = ("prompt", "response", "reference")


class TextTemplate:
    """``what`` names the argument, for messages. Raises ConfigError for a text that no row can fill."""

    def __init__(self, text: str, what: str) -> None:
        do = "double other braces: {{ }}"
        if not isinstance(text, str):
            raise ConfigError(explain(what, text, "text", "put it in quotes"))
        try:
            fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
        except ValueError as error:
            raise ConfigError(explain(what, text, "text with names in braces", f"{error}; {do}")) from None
        names = [name for name, _, _ in fields if name is not None]
        if any(conversion is not None for _, _, conversion in fields):
            raise ConfigError(explain(what, text, "names in braces without !", "take the conversion out"))
        if any(not name or name[0].isdigit() or name[0] in "\"'" for name in names):  # {0}, or JSON in the text
            raise ConfigError(explain(what, text, "names of columns in braces", do))
        if "response" not in names:
            raise ConfigError(explain(what, text, "{response} in it", "say where the response stands"))
        self._text, self._what = text, what
        self.needs_reference = any(_first(name) == "reference" for name in names)
        # Whether a name with dots is a column or reaches into one shows only in a row.
        self.required_columns = tuple(sorted({name for name in names if name == _first(name)} - {*OWN}))

    def fill(self, response: str, *, prompt: str, reference: Any, columns: Mapping[str, Any]) -> str:
        """Raises RewardFailure ``bad_column`` for a column that is missing, or neither text nor a number."""
        values = {**columns, "prompt": prompt, "response": response, "reference": reference}
        try:
            return str(TemplateFormatter(self._what).vformat(self._text, (), values))
        except DataError as error:
            raise RewardFailure("bad_column", str(error)) from None
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            known = ", ".join([*OWN, *columns])
            raise RewardFailure("bad_column", f"{self._what}: {error!r}; the row has {known}") from None


def read_template(text: str | None, file: str | None, what: str) -> str:
    """``text``, or the contents of ``file``. Raises ConfigError unless exactly one is given and can be read."""
    if (text is None) == (file is None):
        got = "neither" if text is None else "both"
        raise ConfigError(
            explain(what, got, f"{what.rpartition(' ')[2]} or {what.rpartition(' ')[2]}_file", "give one")
        )
    if text is not None:
        return text
    try:
        return Path(expand_home(str(file))).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(explain(f"{what}_file", file, "a text file in UTF-8", f"{reason}; check the path")) from None


def _first(name: str) -> str:
    return name.partition(".")[0].partition("[")[0]
