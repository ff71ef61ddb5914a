"""The ledger: every draw, token, reward result and end of a run as rows of an SQLite database; rows are never updated.

Owns the schema, the transactions, and the four operations that durability needs: write a step's rows atomically, read
tokens back, roll back to a step, copy what is not trained yet into a checkpoint. It decides nothing: ``rollout.buffer``
queues rows and reads tokens, ``rollout.ledger_recovery`` finds the right state after a crash, ``rlpost buffer`` reads
it.

Every row carries ``step``, the loop's step that wrote it (1 is the first, as in ``metrics.jsonl``). The state at step k
is given by the rows with ``step <= k``, so rolling back to k deletes exactly the rows > k. ``draw`` is a group's number
(0, 1, ...), ``idx`` a sample's index in its group, ``attempt`` counts a group's restarts. The ``verdicts`` table holds
reward results. One process writes; others may read at any time (write-ahead log).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.errors import RunError, explain
from rlpost.rollout.open_groups import FINISHED, PAUSED, SCORED, OpenGroup, OpenSample
from rlpost.types import Prompt, Segment

FILE = "ledger.sqlite"
SCHEMA_VERSION = 2
CACHE_KIB = 16384
DISK_CODES = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
)
BUSY_TIMEOUT_S = 30.0  # how long a write waits for a reader that blocks it

# In each table the rows of one step are adjacent; ``tokens`` shares its ids with ``segments``.
TABLES = {
    "draws": "draw INTEGER PRIMARY KEY, step INTEGER NOT NULL, uid TEXT NOT NULL UNIQUE, num_samples INTEGER NOT NULL",
    "prompts": "draw INTEGER PRIMARY KEY, step INTEGER NOT NULL, token_ids BLOB NOT NULL, content TEXT NOT NULL",
    "launches": "draw INTEGER, idx INTEGER, attempt INTEGER, step INTEGER NOT NULL, PRIMARY KEY (draw, idx, attempt)",
    "segments": "id INTEGER PRIMARY KEY, draw INTEGER NOT NULL, idx INTEGER NOT NULL, attempt INTEGER NOT NULL, "
    "step INTEGER NOT NULL, policy_version INTEGER NOT NULL, num_tokens INTEGER NOT NULL, trainable INTEGER NOT NULL, "
    "mixed_kv INTEGER NOT NULL, checksum INTEGER NOT NULL",
    "tokens": "id INTEGER PRIMARY KEY, step INTEGER NOT NULL, token_ids BLOB NOT NULL, rollout_logprobs BLOB NOT NULL",
    "finishes": "draw INTEGER, idx INTEGER, attempt INTEGER, step INTEGER NOT NULL, finish_reason TEXT NOT NULL, "
    "PRIMARY KEY (draw, idx, attempt)",
    "verdicts": "draw INTEGER, idx INTEGER, attempt INTEGER, step INTEGER NOT NULL, reward REAL, parts TEXT NOT NULL, "
    "failure TEXT, PRIMARY KEY (draw, idx, attempt)",
    "restarts": "draw INTEGER, attempt INTEGER, step INTEGER NOT NULL, num_tokens INTEGER NOT NULL, "
    "PRIMARY KEY (draw, attempt)",
    "ends": "draw INTEGER PRIMARY KEY, step INTEGER NOT NULL, state TEXT NOT NULL, num_tokens INTEGER NOT NULL, "
    "num_failed_tokens INTEGER NOT NULL",
    "begins": "id INTEGER PRIMARY KEY, step INTEGER NOT NULL",
    "steps": "step INTEGER PRIMARY KEY, totals TEXT NOT NULL",
    "rollbacks": "id INTEGER PRIMARY KEY, step INTEGER NOT NULL, num_groups INTEGER NOT NULL, "
    "num_tokens INTEGER NOT NULL",
    "compactions": "id INTEGER PRIMARY KEY, step INTEGER NOT NULL",
}
INDEXES = ("CREATE INDEX segments_of_sample ON segments (draw, idx)",)
KEYED_BY_SAMPLE = ("launches", "finishes", "verdicts", "restarts")
OF_A_GROUP = ("draws", "prompts", "launches", "segments", "finishes", "verdicts", "restarts")


class DamagedLedger(RunError):
    """The tokens read back differ from those written, or SQLite cannot read the file."""


class Ledger:
    """One run's database. Rows queue in memory until :meth:`commit` writes them in one transaction.

    Raises (every method that touches the file): RunError if the disk is full or not writable,
    :class:`DamagedLedger` if the file cannot be read.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens ``path``; a missing file is created with the schema (never with ``read_only``)."""
        self.path = Path(path)
        self._queue: dict[str, list[tuple[Any, ...]]] = {table: [] for table in TABLES}
        mode = "rwc" if not read_only else "ro" + ("" if self._has_writer() else "&immutable=1")
        with self._translated("open"):
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        try:
            with self._translated("open"):
                self._prepare(read_only)
            self._next_segment = self._first_free_segment()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    # ---- writing --------------------------------------------------------------------------------------------

    def record(self, table: str, *row: Any) -> None:
        """Queue one row, its values in the order of ``TABLES[table]``."""
        self._queue[table].append(row)

    def record_draw(self, draw: int, step: int, prompt: Prompt, num_samples: int) -> None:
        content = {
            "text": prompt.text,
            "reference": prompt.reference,
            "task": str(prompt.columns.get("task", "")),  # as it was in 0.1; read nowhere
            "columns": dict(prompt.columns),
        }
        self.record("draws", draw, step, prompt.uid, num_samples)
        self.record("prompts", draw, step, prompt.token_ids.astype(np.int32).tobytes(), json.dumps(content))

    def record_segment(self, draw: int, index: int, attempt: int, step: int, segment: Segment) -> None:
        token_ids, logprobs = segment.token_ids.tobytes(), segment.rollout_logprobs.tobytes()
        flags = int(segment.trainable), int(segment.mixed_kv)
        row = (draw, index, attempt, step, segment.policy_version, len(segment.token_ids), *flags)
        self.record("segments", self._next_segment, *row, _checksum(token_ids, logprobs))
        self.record("tokens", self._next_segment, step, token_ids, logprobs)
        self._next_segment += 1

    def commit(self) -> None:
        """Write all queued rows, all or none."""
        with self._translated("write"), self._transaction():
            self._insert_queued()
        for rows in self._queue.values():
            rows.clear()

    # ---- reading --------------------------------------------------------------------------------------------

    def read_segments(self, samples: Iterable[tuple[int, int, int]]) -> list[tuple[Segment, ...]]:
        """The segments of each (draw, index, attempt), oldest first."""
        return list(self._each_sample(samples))

    def read_open(self) -> list[OpenGroup]:
        """Every group that has not ended, in the order drawn; tokens remain in the file (``evicted``)."""
        with self.reading():
            groups = self._read_groups()
            if groups:
                self._read_samples(groups)
        for group in groups.values():
            for sample in group.samples:
                sample.state = SCORED if sample.state == SCORED else FINISHED if sample.finish_reason else sample.state
            states = {s.state for s in group.samples}
            if states <= {FINISHED, SCORED}:
                group.state = "ready" if states == {SCORED} else "scoring"
        return list(groups.values())

    def resume_digests(self, step: int) -> dict[str, str]:
        """A digest per table of the rows that a resume after ``step`` steps relies on: those of open groups, ends of
        later steps, and the totals of every step. Tokens are covered by their checksums in ``segments``."""
        which = dict.fromkeys(OF_A_GROUP, "draw IN (SELECT draw FROM open)") | {"ends": f"step > {step:d}"}
        with self.reading():
            return {table: self._digest(table, condition) for table, condition in (which | {"steps": "1"}).items()}

    def unstored_step(self) -> int | None:
        """The newest step that began but left no rows: its process ended before storing anything."""
        newest = int(self._value("SELECT coalesce(max(step), 0) FROM begins"))
        traces = ("launches", "segments", "finishes", "verdicts", "ends", "steps")
        stored = max(int(self._value(f"SELECT coalesce(max(step), 0) FROM {table}")) for table in traces)
        return newest if newest > stored else None

    def held(self) -> tuple[int, int]:
        """(groups, tokens) that have not ended, counted from the rows; tokens of earlier attempts excluded."""
        query = (
            "SELECT coalesce(sum(num_tokens), 0) FROM segments s WHERE draw IN (SELECT draw FROM open) "
            "AND attempt = (SELECT coalesce(max(attempt), 0) FROM restarts r WHERE r.draw = s.draw)"
        )
        with self.reading():
            return int(self._value("SELECT count(*) FROM open")), int(self._value(query))

    def rolled_back(self) -> int:
        """Tokens that rollbacks have discarded so far."""
        return int(self._value("SELECT coalesce(sum(num_tokens), 0) FROM rollbacks"))

    @property
    def compacted_to(self) -> int:
        """The step before which the tokens of ended groups are gone: no rollback may go further back."""
        return int(self._value("SELECT coalesce(max(step), 0) FROM compactions"))

    # ---- durability -----------------------------------------------------------------------------------------

    def roll_back(self, step: int, snapshot: Path | None = None) -> tuple[int, int]:
        """Delete the rows of later steps; returns (groups, tokens) discarded, and records it.

        ``snapshot``: a copy that has rows of the next step if that step was interrupted; they replace the deleted
        rows, and what they hold is not discarded. ``groups`` counts draws that are undone; their prompts are drawn
        again.
        """
        assert step >= self.compacted_to, "rows needed for this rollback were compacted away"
        assert not any(self._queue.values()), "unwritten rows are queued"
        with self._translated("roll back"), self._attached(snapshot or ":memory:", read_only=snapshot is not None):
            if snapshot is None:
                _create_schema(self._db, "copy")
            with self._transaction():
                groups = int(
                    self._value(
                        "SELECT count(*) FROM draws WHERE step > ?1 AND draw NOT IN (SELECT draw FROM "
                        "copy.draws WHERE step > ?1)",
                        step,
                    )
                )
                lost = "step > ?1 AND (id, checksum) NOT IN (SELECT id, checksum FROM copy.segments WHERE step > ?1)"
                tokens = int(self._value(f"SELECT coalesce(sum(num_tokens), 0) FROM segments WHERE {lost}", step))
                earlier = int(self._value("SELECT coalesce(sum(num_tokens), 0) FROM rollbacks WHERE step > ?", step))
                for table in TABLES:
                    self._db.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
                    self._db.execute(f"INSERT INTO {table} SELECT * FROM copy.{table} WHERE step > ?", (step,))
                if groups or tokens or earlier:
                    row = (step, groups, tokens + earlier)
                    self._db.execute("INSERT INTO rollbacks (step, num_groups, num_tokens) VALUES (?, ?, ?)", row)
        self._next_segment = self._first_free_segment()
        return groups, tokens

    def snapshot(self, path: Path, *, step: int) -> None:
        """Copy into a new file at ``path`` what a resume at ``step`` needs: open groups, and rows of later steps.

        Later rows are those of an interrupted step. The caller makes the file durable.
        """
        assert not any(self._queue.values()), "unwritten rows are queued"
        with self._translated("copy"), self._attached(path):
            self._db.execute("PRAGMA copy.journal_mode = OFF")  # a torn copy is discarded as a whole
            self._db.execute("PRAGMA copy.synchronous = OFF")
            with self._transaction():
                _create_schema(self._db, "copy")
                self._copy_rows(step)

    def compact(self, oldest_step: int) -> int:
        """Free the tokens and prompts of groups that ended by ``oldest_step``, the oldest checkpoint kept.

        No rollback goes further back, so nothing reads them again (``rollouts/`` has what was trained). Returns the
        number of segments freed; the rows that record the groups' history are kept.
        """
        before = self.compacted_to
        if oldest_step <= before:
            return 0
        ended = "SELECT draw FROM ends WHERE step > :before AND step <= :oldest"
        abandoned = "SELECT draw FROM restarts WHERE step > :before AND step <= :oldest"
        steps = {"before": before, "oldest": oldest_step}
        with self._translated("compact"), self._transaction():
            freed = self._db.execute(
                f"DELETE FROM tokens WHERE id IN (SELECT id FROM segments WHERE draw IN ({ended})) OR id IN (SELECT id "
                f"FROM segments s WHERE draw IN ({abandoned}) AND attempt < (SELECT max(attempt) FROM restarts r WHERE "
                "r.draw = s.draw AND r.step <= :oldest))",
                steps,
            ).rowcount
            self._db.execute(f"DELETE FROM prompts WHERE draw IN ({ended})", steps)
            self._db.execute("INSERT INTO compactions (step) VALUES (?)", (oldest_step,))
        return freed

    def damage(self) -> str | None:
        """What is wrong with the file or with an open group's tokens; None if nothing is."""
        try:
            found = self._value("PRAGMA quick_check(1)")
            if found != "ok":
                return str(found).splitlines()[-1]
            keys = [(g.order, s.index, g.attempt) for g in self.read_open() for s in g.samples if s.evicted]
            for _ in self._each_sample(keys):  # one at a time: all of them may not fit in memory
                pass
        except (sqlite3.DatabaseError, DamagedLedger) as error:
            return " ".join(str(error).split())
        return None

    def execute(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a reader's own query."""
        with self._translated("read"):
            return self._db.execute(query, parameters).fetchall()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Several queries that see the database at one moment; may be nested, also in a transaction."""
        with self._translated("read"):
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    # ---- private --------------------------------------------------------------------------------------------

    def _has_writer(self) -> bool:
        """Whether a process may be writing: its log is beside the file. Without a writer, a read-only folder (a
        checkpoint, another user's run) can be read without any lock."""
        return self.path.with_name(f"{self.path.name}-wal").exists()

    def _each_sample(self, samples: Iterable[tuple[int, int, int]]) -> Iterator[tuple[Segment, ...]]:
        query = (
            "SELECT s.policy_version, s.trainable, s.mixed_kv, s.checksum, t.token_ids, t.rollout_logprobs "
            "FROM segments s LEFT JOIN tokens t USING (id) WHERE s.draw = ? AND s.idx = ? AND s.attempt = ? "
            "ORDER BY s.id"
        )
        with self.reading():
            for sample in samples:
                rows = self._db.execute(query, sample).fetchall()
                yield tuple(self._to_segment(row, sample) for row in rows)

    def _digest(self, table: str, condition: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        order = "1, 2, 3" if table in KEYED_BY_SAMPLE else "1"
        for row in self._db.execute(f"SELECT * FROM {table} WHERE {condition} ORDER BY {order}"):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def _prepare(self, read_only: bool) -> None:
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        version = int(self._value("PRAGMA user_version"))
        if version == 0 and not read_only and not self._value("SELECT count(*) FROM sqlite_master"):
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._transaction():
                _create_schema(self._db, "main")
            version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            do = "use the version of rlpost that wrote it"
            raise DamagedLedger(explain("ledger", f"{self.path} of schema {version}", f"schema {SCHEMA_VERSION}", do))
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            # A kill loses nothing; checkpoints have what a power failure may take from here.
            self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "CREATE TEMP VIEW open AS SELECT draw FROM main.draws WHERE draw NOT IN (SELECT draw FROM main.ends)"
        )

    @contextmanager
    def _attached(self, path: Path | str, *, read_only: bool = False) -> Iterator[None]:
        """Another database as ``copy``."""
        name = path if path == ":memory:" else Path(path).absolute().as_uri()
        self._db.execute("ATTACH ? AS copy", (name + ("?immutable=1" if read_only else ""),))
        try:
            yield
        finally:
            self._db.execute("DETACH copy")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _translated(self, act: str) -> Iterator[None]:
        """Turn SQLite's errors into ours: one line that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            what, got = f"ledger (cannot {act})", f"{self.path}: {error}"
            code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else None  # None: our own bug
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                do = "run the same command to resume from the last checkpoint, which has a copy"
                raise DamagedLedger(explain(what, got, "an intact database", do)) from error
            if code in DISK_CODES:
                do = "free space or fix the permissions, then run the same command to resume from the last checkpoint"
                raise RunError(explain(what, got, "a writable disk", do)) from error
            raise

    def _insert_queued(self) -> None:
        for table, rows in self._queue.items():
            if rows:
                placeholders = ", ".join("?" * len(rows[0]))
                self._db.executemany(f"INSERT INTO {table} VALUES ({placeholders})", rows)

    def _first_free_segment(self) -> int:
        return 1 + int(self._value("SELECT coalesce(max(id), 0) FROM segments"))

    def _value(self, query: str, *parameters: Any) -> Any:
        with self._translated("read"):
            return self._db.execute(query, parameters).fetchone()[0]

    def _copy_rows(self, step: int) -> None:
        for table in OF_A_GROUP:
            wanted = f"SELECT * FROM main.{table} WHERE draw IN (SELECT draw FROM open) OR step > ?"
            self._db.execute(f"INSERT INTO copy.{table} {wanted}", (step,))
        tokens = "SELECT * FROM main.tokens WHERE id IN (SELECT id FROM copy.segments)"
        self._db.execute(f"INSERT INTO copy.tokens {tokens}")
        self._db.execute("INSERT INTO copy.ends SELECT * FROM main.ends WHERE step > ?", (step,))
        for table in ("begins", "steps", "rollbacks"):
            self._db.execute(f"INSERT INTO copy.{table} SELECT * FROM main.{table}")
        self._db.execute("INSERT INTO copy.compactions (step) VALUES (?)", (step,))

    def _read_groups(self) -> dict[int, OpenGroup]:
        groups: dict[int, OpenGroup] = {}
        query = (
            "SELECT d.draw, d.step, d.uid, d.num_samples, p.token_ids, p.content FROM open JOIN draws d USING (draw) "
            "JOIN prompts p USING (draw) ORDER BY d.draw"
        )
        for draw, step, uid, num_samples, token_ids, content in self._db.execute(query):
            carried = json.loads(content)
            del carried["task"]
            prompt = Prompt(uid=uid, token_ids=np.frombuffer(token_ids, np.int32), **carried)
            samples = [OpenSample(index=i) for i in range(num_samples)]
            groups[draw] = OpenGroup(prompt=prompt, order=draw, drawn_step=step - 1, samples=samples)
        for draw, attempt in self._db.execute("SELECT draw, max(attempt) FROM restarts GROUP BY draw"):
            if draw in groups:
                groups[draw].attempt = attempt
        return groups

    def _read_samples(self, groups: Mapping[int, OpenGroup]) -> None:
        first = min(groups)

        def rows(table: str, columns: str) -> Iterator[tuple[OpenGroup, OpenSample, tuple[Any, ...]]]:
            query = f"SELECT draw, idx, attempt, {columns} FROM {table} WHERE draw >= ?"
            for draw, index, attempt, *values in self._db.execute(query, (first,)):
                group = groups.get(draw)
                if group is not None and attempt == group.attempt:
                    yield group, group.samples[index], tuple(values)

        for _, sample, (step,) in rows("launches", "step"):
            sample.first_step = step - 1
        for group, sample, (num_tokens, version) in rows("segments", "num_tokens, policy_version"):
            sample.num_tokens += num_tokens
            sample.evicted, sample.state = True, PAUSED
            group.oldest_version = version if group.oldest_version is None else min(group.oldest_version, version)
        for _, sample, (reason,) in rows("finishes", "finish_reason"):
            sample.finish_reason = reason
        for _, sample, (reward, parts, failure) in rows("verdicts", "reward, parts, failure"):
            sample.reward, sample.failure, sample.state = reward, failure, SCORED
            sample.reward_parts = json.loads(parts) or None

    def _to_segment(self, row: tuple[Any, ...], sample: tuple[int, int, int]) -> Segment:
        version, trainable, mixed_kv, checksum, token_ids, logprobs = row
        if token_ids is None or _checksum(token_ids, logprobs) != checksum:
            what = f"ledger {self.path}: tokens of draw {sample[0]}, sample {sample[1]}"
            do = "run the same command to resume from the last checkpoint, which has a copy"
            raise DamagedLedger(explain(what, "gone" if token_ids is None else "other bytes", "as written", do))
        return Segment(
            token_ids=np.frombuffer(token_ids, np.int32),
            rollout_logprobs=np.frombuffer(logprobs, np.float32),
            policy_version=version,
            trainable=bool(trainable),
            mixed_kv=bool(mixed_kv),
        )


def _create_schema(db: sqlite3.Connection, schema: str) -> None:
    for table, columns in TABLES.items():
        db.execute(f"CREATE TABLE {schema}.{table} ({columns})")
    for index in INDEXES:
        db.execute(index.replace("CREATE INDEX ", f"CREATE INDEX {schema}."))
    db.execute(f"PRAGMA {schema}.user_version = {SCHEMA_VERSION}")


def _checksum(token_ids: bytes, logprobs: bytes) -> int:
    return zlib.crc32(logprobs, zlib.crc32(token_ids))
