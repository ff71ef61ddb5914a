"""What a run has spent on a service, counted in one small database by all its reward workers.

A request is counted before it is sent and its tokens when the reply is there, so neither a worker that dies nor a run
that is killed and resumed loses count. Reached limits are kept to exactly in requests; in tokens, the requests then in
flight still end.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from rlpost.errors import ConfigError, explain
from rlpost.rewards.failures import RewardFailure

FILE_NAME = "reward_budget.sqlite"
BUSY_S = 20.0  # another worker's transaction takes a millisecond


class Budget:
    """``account``: whose requests are counted together. Raises ConfigError for limits that allow nothing.

    Without limits nothing is counted. Before :meth:`use_folder`, or without a folder, the count is this process's own.
    """

    def __init__(self, what: str, account: str, *, requests: int | None, tokens: int | None) -> None:
        for name, limit in (("budget_requests", requests), ("budget_tokens", tokens)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise ConfigError(explain(f"{what}: {name}", limit, "a whole number >= 1", "null is no limit"))
        self._account, self._requests, self._tokens = account, requests, tokens
        self._folder: Path | None = None
        self._database: sqlite3.Connection | None = None

    @property
    def counts_tokens(self) -> bool:
        return self._tokens is not None

    def use_folder(self, folder: Path | None) -> None:
        """Where the count is kept; the folder is created with the first request."""
        self._folder = folder

    def take_request(self) -> None:
        """Count one request. Raises RewardFailure ``budget`` if a limit is reached; it is then not counted."""
        if self._requests is None and self._tokens is None:
            return
        try:
            with self._open() as database:
                database.execute("BEGIN IMMEDIATE")  # reads and writes with no other worker in between
                row = database.execute("SELECT requests, tokens FROM spent WHERE account = ?", (self._account,))
                requests, tokens = row.fetchone() or (0, 0)
                for unit, spent, limit in (("requests", requests, self._requests), ("tokens", tokens, self._tokens)):
                    if limit is not None and spent >= limit:
                        raise RewardFailure("budget", f"{spent} of {limit} {unit} are spent")
                self._add(database, requests=1)
        except (sqlite3.Error, OSError) as error:
            raise RewardFailure("budget", f"cannot be counted: {error}") from None

    def add_tokens(self, tokens: int) -> None:
        """Count what a reply has used. Raises RewardFailure ``budget`` if that is impossible."""
        if self._tokens is None:
            return
        try:
            with self._open() as database:
                self._add(database, tokens=tokens)
        except (sqlite3.Error, OSError) as error:
            raise RewardFailure("budget", f"cannot be counted: {error}") from None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            path = ":memory:" if self._folder is None else str(self._folder / FILE_NAME)
            self._database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            columns = "account TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL"
            self._database.execute(f"CREATE TABLE IF NOT EXISTS spent ({columns})")
        return self._database

    def _add(self, database: sqlite3.Connection, *, requests: int = 0, tokens: int = 0) -> None:
        database.execute(
            "INSERT INTO spent VALUES (?1, ?2, ?3) ON CONFLICT (account) DO UPDATE SET "
            "requests = requests + ?2, tokens = tokens + ?3",
            (self._account, requests, tokens),
        )
