"""A cache of reward results: an SQLite table from a call's content to the function's outcomes.

A key is a digest of everything the function was given and of its version, so an edited reward is called again. Failures
and missing opinions are never stored. Losing the file only costs time: it is written without waiting for the disk, and
an unreadable one is replaced. One owner, one thread: the run's main one. Other runs may use the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rlpost.rewards.functions import FunctionFacts
from rlpost.rewards.outcomes import Outcome
from rlpost.rewards.worker_pool import Call

FILE_NAME = "verdicts.sqlite"
BUSY_S = 5.0  # another run's write takes milliseconds
LAYOUT = 1  # of keys and values; another number starts a new table


class RewardResultCache:
    """``say`` is called once, with one line, if the file cannot be used; the run then continues without it."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = folder / FILE_NAME, say
        self._table = f"verdicts_{LAYOUT}"
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # busy, read-only or full: not ours to remove
                    raise
                self._path.unlink()
                self._open()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def get(self, key: str) -> tuple[Outcome, ...] | None:
        """The stored outcomes of the call with this key, if any."""
        if self._database is None:
            return None
        try:
            row = self._database.execute(f"SELECT outcomes FROM {self._table} WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return None if row is None else tuple(Outcome(**one) for one in json.loads(row[0]))

    def put(self, entries: Sequence[tuple[str, Sequence[Outcome]]]) -> None:
        """Store the calls that have a reward for every response."""
        rows = [
            (key, json.dumps([asdict(outcome) for outcome in outcomes]))
            for key, outcomes in entries
            if all(outcome.reward is not None for outcome in outcomes)
        ]
        if self._database is None or not rows:
            return
        try:
            with self._database:
                self._database.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, timeout=BUSY_S)
        self._database.execute("PRAGMA synchronous = OFF")
        with self._database:
            self._database.execute(f"CREATE TABLE IF NOT EXISTS {self._table} (key TEXT PRIMARY KEY, outcomes TEXT)")

    def _give_up(self, error: Exception) -> None:
        with contextlib.suppress(sqlite3.Error):
            self.close()
        self._database = None
        reason = " ".join(str(error).split())
        self._say(
            f"warning: reward cache {self._path}: {reason}; continuing without it (reward.cache=false turns it off)"
        )


def digest_call(call: Call, facts: FunctionFacts) -> str:
    """The call's key: everything the function sees, and its version."""
    content = {
        "version": facts.version,
        "prompt": call.question.prompt,
        "reference": call.question.reference,
        "columns": dict(call.question.columns),
        "opens_thought": call.question.opens_thought,
        "responses": [[r.text, r.finish_reason, list(r.token_ids)] for r in call.responses],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
