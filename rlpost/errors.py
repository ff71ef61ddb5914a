"""Errors that a user can cause and mend, each one line: what, got, expected, what to do.

Anything else (our own bugs) is an ``assert`` or an ordinary exception with its traceback. The command line
prints a :class:`UserError` without a traceback and exits with its ``exit_code``.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user or their machine can mend; the message says how. Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a combination of keys that cannot work."""


class DataError(UserError):
    """A data file that is missing or malformed; names the file and, where there is one, the line."""


class ModelError(UserError):
    """A model folder that is missing, has no weights, or does not fit the task."""


class RunError(UserError):
    """The run cannot go on: a guard stopped it, or its directory cannot be used. Exit code 3."""

    exit_code = 3


class WorkerLost(RunError):
    """Workers of a cluster died or hang; the loop starts them anew, and this is what is said where it cannot."""


class ShardsLost(RunError):
    """Workers were lost, and with them the trainer state of the last finished step: the run must go back."""


def explain(what: str, got: object, expected: str, do: str) -> str:
    """One line in the house form: ``what: got X; expected Y; do Z``."""
    return f"{what}: got {got!r}; expected {expected}; {do}"
