"""The ledger as text: an overview of a run, and the history of one draw. Only reads the database; ``rlpost buffer``.

The run may be active: rows appear at the end of each rollout and of each step, so what is in the engine right now is
shown as it was then.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rlpost.durable.filesystem import POINTER
from rlpost.errors import RunError, explain
from rlpost.rollout.ledger import FILE, Ledger
from rlpost.rollout.open_groups import OpenGroup

PHASES = ("waiting", "paused", "scoring", "ready")


def find_ledger(run: Path) -> Path:
    """The ledger of a run directory (or of a checkpoint, or the file itself). Raises RunError."""
    pointer = run / POINTER
    path = Path(pointer.read_text().strip()) if pointer.is_file() else run / FILE if run.is_dir() else run
    if not path.is_file():
        raise RunError(explain("ledger", f"nothing at {path}", "a run directory", "check the path"))
    return path


def describe_ledger(run: Path) -> str:
    """How many groups and tokens are in which state, and what is open, by age."""
    path = find_ledger(run)
    ledger = Ledger(path, read_only=True)
    try:
        with ledger.reading():
            groups = ledger.read_open()
            rows = [*_totals(ledger, groups), *_open_rows(groups)]
            undone = ledger.execute("SELECT count(*), coalesce(sum(num_tokens), 0) FROM rollbacks")[0]
            step = ledger.execute("SELECT coalesce(max(step), 0) FROM steps")[0][0]
            (freed,) = ledger.execute("SELECT count(*) FROM segments WHERE id NOT IN (SELECT id FROM tokens)")[0]
    finally:
        ledger.close()
    if undone[0]:
        rows.append(f"undone   {undone[1]:,} tokens, by {undone[0]} rollback(s) to a checkpoint")
    size = f"{path.stat().st_size / 1e6:,.1f} MB"
    notes = f"; the tokens of {freed:,} ended segments were freed (rollouts/ has those trained)" if freed else ""
    return "\n".join([f"{path}: after step {step}, {size}{notes}", *rows])


def describe_draw(run: Path, uid: str) -> str:
    """Everything that happened to one draw. Raises RunError for a uid that was never drawn."""
    ledger = Ledger(find_ledger(run), read_only=True)
    try:
        found = ledger.execute("SELECT draw, step, num_samples FROM draws WHERE uid = ?", uid)
        if not found:
            last = ledger.execute("SELECT uid FROM draws ORDER BY draw DESC LIMIT 1")
            do = f"the last draw was {last[0][0]}" if last else "nothing was drawn yet"
            raise RunError(explain("uid", uid, "a draw of this run, EPOCH:POSITION", do))
        draw, step, num_samples = found[0]
        lines = [f"{uid}: draw {draw}, in step {step}; {_end(ledger, draw)}", *_prompt(ledger, draw)]
        lines += [
            f"restarted in step {when} as attempt {attempt}: {tokens} tokens discarded"
            for attempt, when, tokens in ledger.execute(
                "SELECT attempt, step, num_tokens FROM restarts WHERE draw = ? ORDER BY attempt", draw
            )
        ]
        for index in range(num_samples):
            lines += _sample(ledger, draw, index)
    finally:
        ledger.close()
    return "\n".join(lines)


def _totals(ledger: Ledger, groups: list[OpenGroup]) -> list[str]:
    """The totals after the last step and what came since; whether they balance."""
    settled = ledger.execute("SELECT step, totals FROM steps ORDER BY step DESC LIMIT 1")
    step, totals = (settled[0][0], json.loads(settled[0][1])) if settled else (0, {})
    numbers, tokens = Counter(totals.get("groups_ended", {})), Counter(totals.get("tokens_ended", {}))
    for state, num_tokens, num_failed in ledger.execute(
        "SELECT state, num_tokens, num_failed_tokens FROM ends WHERE step > ?", step
    ):
        numbers[state] += 1
        tokens[state] += num_tokens - num_failed
        tokens["failed[reward]"] += num_failed
    since = {
        table: f"SELECT coalesce(sum(num_tokens), 0) FROM {table} WHERE step > ?" for table in ("segments", "restarts")
    }
    tokens["discarded[restart]"] += ledger.execute(since["restarts"], step)[0][0]
    received = totals.get("tokens_received", 0) + ledger.execute(since["segments"], step)[0][0]
    (drawn,) = ledger.execute("SELECT coalesce(max(draw) + 1, 0) FROM draws")[0]
    phases, held = Counter(group.phase() for group in groups), sum(group.num_tokens for group in groups)
    places = [f"{phases[phase]:,} {phase}" for phase in PHASES] + [f"{n:,} {state}" for state, n in numbers.items()]
    ended = [f"{n:,} {state}" for state, n in tokens.items() if n]
    lines = [
        f"groups   {drawn:,} drawn = {' + '.join(places)}",
        f"tokens   {received:,} received = {' + '.join([f'{held:,} held', *ended])}",
    ]
    if drawn != len(groups) + sum(numbers.values()) or received != held + sum(tokens.values()):
        lines.append("         these sums do not balance: please report it, with this file")
    return lines


def _open_rows(groups: list[OpenGroup]) -> list[str]:
    """The waiting groups, by the step that drew them."""
    if not groups:
        return []
    rows = ["open     drawn in step   groups   finished samples   tokens   oldest policy"]
    for step in sorted({group.drawn_step for group in groups}):
        same = [group for group in groups if group.drawn_step == step]
        samples = [sample for group in same for sample in group.samples]
        finished = f"{sum(bool(s.finish_reason) for s in samples)} of {len(samples)}"
        oldest = min((g.oldest_version for g in same if g.oldest_version is not None), default=None)
        tokens = sum(group.num_tokens for group in same)
        version = "-" if oldest is None else str(oldest)
        rows.append(f"         {step + 1:>13}   {len(same):>6}   {finished:>16}   {tokens:>6,}   {version:>13}")
    return rows


def _end(ledger: Ledger, draw: int) -> str:
    ended = ledger.execute("SELECT state, step FROM ends WHERE draw = ?", draw)
    return f"{ended[0][0]} in step {ended[0][1]}" if ended else "open"


def _prompt(ledger: Ledger, draw: int) -> list[str]:
    found = ledger.execute("SELECT content FROM prompts WHERE draw = ?", draw)
    if not found:
        return ["prompt   (freed; rollouts/ has it if it was trained)"]
    content = json.loads(found[0][0])
    lines = content["text"].splitlines() or [""]
    reference = [] if content["reference"] is None else [f"reference  {content['reference']}"]
    return [f"prompt   {lines[0]}", *(f"         {line}" for line in lines[1:]), *reference]


def _sample(ledger: Ledger, draw: int, index: int) -> list[str]:
    key = (draw, index)
    segments = ledger.execute(
        "SELECT attempt, step, policy_version, num_tokens, mixed_kv FROM segments WHERE draw = ? AND idx = ? "
        "ORDER BY id",
        *key,
    )
    finishes = dict(ledger.execute("SELECT attempt, finish_reason FROM finishes WHERE draw = ? AND idx = ?", *key))
    launches = dict(ledger.execute("SELECT attempt, step FROM launches WHERE draw = ? AND idx = ?", *key))
    results: dict[int, tuple[Any, ...]] = {
        row[0]: row[1:]
        for row in ledger.execute(
            "SELECT attempt, step, reward, parts, failure FROM verdicts WHERE draw = ? AND idx = ?", *key
        )
    }
    attempt = max(launches, default=0)
    tokens = sum(row[3] for row in segments if row[0] == attempt)
    state = finishes.get(attempt) or ("paused" if tokens else "waiting")
    lines = [f"sample {index}: {tokens} tokens, {state}"]
    for number, (of, step, version, num_tokens, mixed_kv) in enumerate(segments):
        started = "launched" if number == 0 or segments[number - 1][0] != of else "kept" if mixed_kv else "resumed"
        last = number + 1 == len(segments) or segments[number + 1][0] != of
        ended = finishes.get(of, "interrupted") if last else "interrupted"
        again = f", attempt {of}" if of else ""
        lines.append(f"    step {step}, policy {version}: {started}, {num_tokens} tokens, {ended}{again}")
    if attempt in results:
        step, reward, parts, failure = results[attempt]
        named = ", ".join(f"{name} {value:g}" for name, value in json.loads(parts).items())
        result = f"failed: {failure}" if failure else f"reward {reward:g}" + (f" ({named})" if named else "")
        lines.append(f"    step {step}: {result}")
    return lines
