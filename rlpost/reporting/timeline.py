"""Where a run's time went: ``timeline.jsonl``, the phases of every step and every stay of a sample in the engine.

Owns that file, its reading, and the trace that Perfetto and ``chrome://tracing`` open. ``reporting.reporter`` feeds
:class:`TimelineWriter`; code that shows a run calls :func:`read_timeline`. A line is

    {"step": 3, "time_s": 12.5, "phases": [["generate", 8.1, 11.9], ...], "spans": {"uid": [...], "start_s": [...]},
     "admitted": [uid, ...], "dropped": [[uid, "rejected[filter]"], ...],
     "iterations": {"phase": "generate", "moments": [[...], ...], "targets": [...]}}

with times in seconds since the run began (``time_s`` of ``metrics.jsonl``; pauses between a run's attempts excluded)
and ``step`` counted as there. Time between two phases was spent on the log and the display. A step's first line is
written when it is trained; saving and evaluating after it add lines of their own, as does an interrupted step. The
reader merges a step's lines.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain
from rlpost.reporting import metrics

FILE = "timeline.jsonl"
COLUMNS = ("uid", "index", "replica", "policy_version", "start_s", "end_s", "tokens", "kind", "end")
DIGITS = 4  # of a time: a tenth of a millisecond

Phase = tuple[str, float, float]  # name, start and end in seconds since the run began


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeline:
    """One step. ``spans`` has the columns :data:`COLUMNS`, one entry per stay of a sample in the engine."""

    step: int
    phases: list[Phase]
    spans: dict[str, list[Any]]
    admitted: list[str]  # uids of the groups trained
    dropped: list[tuple[str, str]]  # (uid, how the group ended)
    iterations: list[dict[str, Any]] = field(default_factory=list)  # sums over the engines' iterations, by phase


class TimelineWriter:
    """Appends to the run directory's timeline. Call :meth:`rewind` before the first phase.

    Args:
        run_dir: exists and is writable.
        clock: seconds since the run began.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float]) -> None:
        self._log = metrics.JsonLines(run_dir / FILE)
        self._clock = clock
        self._current: tuple[str, int, float] | None = None  # name, step, start
        self._ended: list[tuple[int, Phase]] = []

    def rewind(self, time_s: float) -> None:
        """Drop what came later: the run resumes from there."""
        self._log.cut(lambda row: row["time_s"] <= time_s)
        self._current, self._ended = None, []

    def phase(self, name: str, step: int) -> None:
        """A phase of ``step`` begins, and the previous one ends."""
        now = self._end_phase()
        self._current = (name, step, now)

    def log(
        self,
        step: int,
        *,
        spans: Mapping[str, list[Any]] | None = None,
        offset_s: float = 0.0,
        admitted: Sequence[str] = (),
        dropped: Sequence[tuple[str, str]] = (),
        iterations: Mapping[str, Any] | None = None,
    ) -> None:
        """One line: the phases of ``step`` that have ended (the current one ends here), and what else is known of it.

        ``spans``: columns of equal length; ``offset_s`` is added to their times.
        """
        now = self._end_phase()
        row: dict[str, Any] = {"step": step, "time_s": round(now, metrics.TIME_DIGITS)}
        row["phases"] = [phase for of, phase in self._ended if of == step]
        self._ended = [(of, phase) for of, phase in self._ended if of != step]
        if spans is not None:
            row["spans"] = {name: spans[name] for name in COLUMNS}
            for name in ("start_s", "end_s"):
                row["spans"][name] = [round(t + offset_s, DIGITS) for t in spans[name]]
        if admitted:
            row["admitted"] = list(admitted)
        if dropped:
            row["dropped"] = list(dropped)
        if iterations is not None:
            row["iterations"] = dict(iterations)
        self._log.append(row)

    def close(self) -> None:
        self._log.close()

    def _end_phase(self) -> float:
        now = self._clock()
        if self._current is not None:
            name, step, start = self._current
            self._ended.append((step, (name, round(start, DIGITS), round(now, DIGITS))))
            self._current = None
        return now


def read_timeline(run_dir: Path) -> list[StepTimeline]:
    """All steps with a complete line, in order; the run may be active.

    Step 0 is what came before the first step. Raises RunError if there is no timeline.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise RunError(explain("timeline", f"nothing at {path}", "a run directory with a timeline", "check the path"))
    steps: dict[int, StepTimeline] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                step = steps.get(row["step"])
                if step is None:
                    spans: dict[str, list[Any]] = {name: [] for name in COLUMNS}
                    step = StepTimeline(step=row["step"], phases=[], spans=spans, admitted=[], dropped=[])
                    steps[step.step] = step
                step.phases.extend((name, start, end) for name, start, end in row["phases"])
                for name, values in row.get("spans", {}).items():
                    step.spans[name].extend(values)
                step.admitted.extend(row.get("admitted", []))
                step.dropped.extend((uid, end) for uid, end in row.get("dropped", []))
                if "iterations" in row:
                    step.iterations.append(row["iterations"])
    return [steps[number] for number in sorted(steps)]


# ---- concurrency and slots -------------------------------------------------------------------------------------------


def concurrency(start_s: Sequence[float], end_s: Sequence[float]) -> list[tuple[float, int]]:
    """(time, samples in the engine from then on), at every change; simultaneous starts and ends are one change."""
    changes: dict[float, int] = defaultdict(int)
    for start, end in zip(start_s, end_s, strict=True):
        changes[start] += 1
        changes[end] -= 1
    curve, running = [], 0
    for time in sorted(changes):
        running += changes[time]
        if changes[time]:
            curve.append((time, running))
    return curve


def assign_slots(start_s: Sequence[float], end_s: Sequence[float]) -> list[int]:
    """A row for each span so that no two in a row overlap, with as few rows as possible: the lowest free one."""
    slots = [0] * len(start_s)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for number in sorted(range(len(start_s)), key=lambda n: (start_s[n], end_s[n])):
        while busy and busy[0][0] <= start_s[number]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slots[number] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end_s[number], slots[number]))
    return slots


# ---- the trace -------------------------------------------------------------------------------------------------------

LOOP = 0  # the process id of the loop's phases; replica r of the engine is r + 1


def write_trace(run_dir: Path, out: Path) -> int:
    """The run's timeline as a trace in Chrome's JSON format, compressed if ``out`` ends in ``.gz``.

    Returns the number of events. Processes are the loop and each engine replica; an engine's threads are its slots;
    arrows lead from where a sample was interrupted to where it resumed; a counter shows the samples in the engine.
    """
    trace = {"displayTimeUnit": "ms", "traceEvents": list(_events(read_timeline(run_dir)))}
    text = json.dumps(trace, separators=(",", ":"))
    try:
        if out.suffix == ".gz":
            out.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            out.write_text(text, encoding="utf-8")
    except OSError as error:
        do = "choose another path for the trace"
        raise RunError(explain("trace", str(out), "a writable file", f"{error.strerror}; {do}")) from None
    return len(trace["traceEvents"])


@dataclass(slots=True)
class _ReplicaSpans:
    """Columns over all steps, for one replica."""

    start_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def _events(steps: Sequence[StepTimeline]) -> Iterator[dict[str, Any]]:
    yield _named("process_name", "loop", LOOP)
    yield _named("thread_name", "phases", LOOP)
    replicas: dict[int, _ReplicaSpans] = defaultdict(_ReplicaSpans)
    for step in steps:
        for name, start, end in step.phases:
            yield _slice(name, LOOP, 0, start, end, {"step": step.step})
        ends = dict.fromkeys(step.admitted, "trained") | dict(step.dropped)
        for values in zip(*(step.spans[name] for name in COLUMNS), strict=True):
            row = dict(zip(COLUMNS, values, strict=True))
            replica = replicas[row["replica"]]
            replica.start_s.append(row["start_s"])
            replica.end_s.append(row["end_s"])
            replica.rows.append(row | {"step": step.step, "group": ends.get(row["uid"], "waits")})
    for number in sorted(replicas):
        yield from _replica_events(number + 1, replicas[number])


def _replica_events(pid: int, spans: _ReplicaSpans) -> Iterator[dict[str, Any]]:
    yield _named("process_name", f"engine {pid - 1}", pid)
    slots = assign_slots(spans.start_s, spans.end_s)
    for slot in range(max(slots, default=-1) + 1):
        yield _named("thread_name", f"slot {slot}", pid, slot)
    last: dict[str, tuple[int, dict[str, Any]]] = {}  # sample -> slot and row of its previous stay
    for number, (slot, row) in enumerate(zip(slots, spans.rows, strict=True)):
        sample = f"{row['uid']}/{row['index']}"
        shown = {name: row[name] for name in ("step", "policy_version", "tokens", "kind", "end", "group")}
        yield _slice(sample, pid, slot, row["start_s"], row["end_s"], shown)
        if sample in last and last[sample][1]["end"] in ("paused", "lost"):
            before_slot, before = last[sample]
            leaves = max(_micro(before["start_s"]), _micro(before["end_s"]) - 1)  # an arrow starts inside a slice
            arrow = {"name": "resumes", "cat": "sample", "id": number, "pid": pid}
            yield arrow | {"ph": "s", "tid": before_slot, "ts": leaves}
            yield arrow | {"ph": "f", "bp": "e", "tid": slot, "ts": _micro(row["start_s"])}
        last[sample] = (slot, row)
    for time, running in concurrency(spans.start_s, spans.end_s):
        counter = {"ph": "C", "name": "samples in the engine", "pid": pid, "ts": _micro(time)}
        yield counter | {"args": {"running": running}}


def _named(what: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(name: str, pid: int, tid: int, start: float, end: float, shown: dict[str, Any]) -> dict[str, Any]:
    ts = _micro(start)
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": _micro(end) - ts, "args": shown}


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)
