"""One finding of the doctor, and how errors of other parts become one. No I/O; every check returns findings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlpost.errors import UserError, one_line

STATUSES = ("ok", "warning", "problem", "skipped")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """``found``: what there is. ``do``: what to type; every warning and every problem has it."""

    name: str
    status: str
    found: str
    do: str = ""

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert bool(self.do) == (self.status in ("warning", "problem")), f"{self.name}: {self.status}, do={self.do!r}"


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, status="ok", found=one_line(found))


def skipped(name: str, why: str) -> Finding:
    return Finding(name=name, status="skipped", found=one_line(why))


def warning(name: str, found: str, do: str) -> Finding:
    return Finding(name=name, status="warning", found=one_line(found), do=one_line(do))


def problem(name: str, found: str, do: str) -> Finding:
    return Finding(name=name, status="problem", found=one_line(found), do=one_line(do))


def of_error(name: str, error: UserError, status: str = "problem") -> Finding:
    return of_failure(name, str(error), "fix what it names, then run rlpost doctor again", status)


def of_failure(name: str, text: str, do: str, status: str = "problem") -> Finding:
    """``text`` in the house form (``errors.explain``) says in its last part what to do; ``do`` is for any other."""
    form = re.fullmatch(r"(.*?; expected [^;]*); (.*)", one_line(text))
    found, do = form.groups() if form else (text, do)
    return Finding(name=name, status=status, found=one_line(found).removeprefix(f"{name}: "), do=one_line(do))
