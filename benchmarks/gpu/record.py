"""What a stage reports: figures, requirements that do not hold, or why it was skipped.

Written to a file line by line as the stage goes, so that what was measured survives its end, whatever that is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

ERROR = re.compile(r"^([\w.]*(Error|Exception|Interrupt|Exit)\b.*|rlpost: .*|.*\berror:.*)$")
LONGEST_REASON = 300  # characters


class Skipped(Exception):
    """Raised by :meth:`Record.skip`: the stage cannot apply here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What every stage is told."""

    device: str  # "cpu" or "cuda"
    small: bool  # tiny shapes, on either device

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """bfloat16 is what a GPU trains in; on a CPU it is slow, and not every one computes with it."""
        return "bfloat16" if self.on_gpu else "float32"


class Record:
    """One stage's file, open for writing."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, **figures: Any) -> None:
        """Figures by name, with the unit in the name."""
        self._write(figures={name: _short(value) for name, value in figures.items()})

    def require(self, holds: bool, what: str) -> None:
        """The stage goes on if ``what`` does not hold: later figures may tell why."""
        if not holds:
            self._write(failed=what)

    def skip(self, reason: str) -> None:
        self._write(skipped=reason)
        raise Skipped(reason)

    def finish(self) -> None:
        self._write(finished=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes the seconds of the block as ``name``."""
        start = perf_counter()
        yield
        self.note(**{name: perf_counter() - start})

    def _write(self, **entry: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@dataclass(kw_only=True, slots=True)
class Reported:
    """A record read back."""

    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    skipped: str | None = None
    finished: bool = False


def read(file: Path) -> Reported:
    """A last line that was cut off when the process was killed is left out."""
    reported = Reported()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        reported.figures.update(entry.get("figures", {}))
        reported.failed += [entry["failed"]] if "failed" in entry else []
        reported.skipped = entry.get("skipped", reported.skipped)
        reported.finished |= entry.get("finished", False)
    return reported


def last_error(log: Path) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if ERROR.match(line)]
    return ((named or lines or ["no output"])[-1])[:LONGEST_REASON]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
