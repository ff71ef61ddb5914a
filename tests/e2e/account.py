"""Whether a run's files tell of one whole story: every draw once, every sample trained at most once, nothing lost."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from .program import read_metrics, rollouts_of, steps_of

LEDGER_TABLES = ("draws", "prompts", "steps", "launches", "segments", "finishes", "verdicts", "restarts", "ends")


def ledger_rows(run: Path) -> dict[str, list[tuple[Any, ...]]]:
    db = sqlite3.connect(run / "ledger.sqlite")
    rows = {table: sorted(db.execute(f"SELECT * FROM {table}"), key=repr) for table in LEDGER_TABLES}
    db.close()
    return rows


def assert_nothing_lost(run: Path, *, steps: int, samples: int, prompts: int, eval_every: int) -> None:
    """Each draw of an epoch is trained at most once, in whole groups; what is drawn and not trained is still open.

    samples: trained in a step. prompts: of the data.
    """
    trained = [(row["uid"], row["index"]) for rows in rollouts_of(run).values() for row in rows]
    assert len(trained) == len(set(trained)) == steps * samples, "a sample is missing or was trained twice"
    rows = ledger_rows(run)
    drawn = {draw: uid for draw, _, uid, _ in rows["draws"]}
    places = [f"{n // prompts}:{n % prompts}" for n in range(len(drawn))]
    assert sorted(drawn.values()) == sorted(places), "a prompt was skipped or drawn twice"
    ended = {draw for draw, *_ in rows["ends"]}
    assert {drawn[draw] for draw in ended} == {uid for uid, _ in trained}
    summary = json.loads((run / "finished.json").read_text())
    db = sqlite3.connect(run / "ledger.sqlite")
    tokens = [num for draw, num in db.execute("SELECT draw, num_tokens FROM segments") if draw in ended]
    db.close()
    assert sum(tokens) == summary["tokens"]["trained"], "a token was lost or is there twice"
    assert [row["step"] for row in steps_of(run)] == list(range(1, steps + 1))
    evaluated = [row["step"] for row in read_metrics(run) if "eval/accuracy" in row]
    due = sorted({*range(0, steps + 1, eval_every), steps})
    assert evaluated == due, "an evaluation is missing or was logged twice"
