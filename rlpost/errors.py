"""Errors that a user can cause and fix, each one line: what, got, expected, what to do.

Anything else (our own bugs) is an ``assert`` or an ordinary exception with its traceback. The command line
prints a :class:`UserError` without a traceback and exits with its ``exit_code``.
"""

from __future__ import annotations

import re


class UserError(Exception):
    """Something the user can fix in the configuration or on the machine; the message says how. Exit code 2.

    The message may quote a user's text, which may hold anything: see :func:`one_line`.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    """An invalid key or an impossible combination of keys."""


class DataError(UserError):
    """A data file that is missing or malformed; names the file and, where possible, the line."""


class ModelError(UserError):
    """A model folder that is missing, has no weights, or does not fit the task."""


class RunError(UserError):
    """The run cannot continue: a guard stopped it, or its directory is unusable. Exit code 3."""

    exit_code = 3


class WorkerLost(RunError):
    """Workers of a cluster died or hang. The run restarts them; users see this only when that fails."""


class ShardsLost(RunError):
    """Workers were lost together with the trainer state of the last finished step: the run must go back."""


def explain(what: str, got: object, expected: str, do: str) -> str:
    """One line in the house form: ``what: got X; expected Y; do Z``."""
    return f"{what}: got {got!r}; expected {expected}; {do}"


def one_line(text: str) -> str:
    """``text`` on one line that is safe to print: line breaks as spaces, what cannot be printed as ``\\x1b`` or so."""
    return escape_unprintable(" ".join(re.split(r"\s*\n\s*", text)))


def escape_unprintable(text: str) -> str:
    """``text`` with ``\\x1b`` or so for every character that cannot be printed, line breaks included."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
