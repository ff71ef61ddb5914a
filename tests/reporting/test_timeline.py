"""The timeline: what is recorded, kept by a resume, read back, and shown as a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.errors import RunError
from rlpost.reporting.timeline import COLUMNS, TimelineWriter, assign_slots, concurrency, read_timeline, write_trace

ROWS = {
    "uid": ["0:0", "0:0", "0:1"],
    "index": [0, 1, 0],
    "replica": [0, 0, 0],
    "policy_version": [0, 0, 0],
    "start_s": [1.0, 1.0, 2.0],
    "end_s": [2.0, 4.0, 4.0],
    "tokens": [3, 9, 5],
    "kind": ["launched", "launched", "launched"],
    "end": ["stop", "paused", "length"],
}
LATER = {name: [values[1]] for name, values in ROWS.items()} | {
    "policy_version": [1],
    "start_s": [6.0],
    "end_s": [7.0],
    "kind": ["resumed"],
    "end": ["stop"],
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write_two_steps(folder: Path, clock: Clock) -> TimelineWriter:
    """Phases of a second each: two steps, with a checkpoint and an evaluation between them."""
    writer = TimelineWriter(folder, clock)
    for name in ("publish", "generate", "update"):
        writer.phase(name, 1)
        clock.now += 1
    writer.log(1, spans=ROWS, offset_s=10.0, admitted=["0:0"], dropped=[("0:1", "rejected[x]")])
    clock.now += 0.5  # the log's own time is no phase
    writer.phase("save", 1)
    clock.now += 1
    writer.log(1)
    for name, step in (("publish", 2), ("eval", 1), ("generate", 2)):
        writer.phase(name, step)
        clock.now += 1
        if name == "eval":
            writer.log(1)
    writer.log(2, spans=LATER, offset_s=10.0, admitted=["0:2"])
    return writer


def test_a_step_is_read_back_from_its_lines(tmp_path: Path, clock: Clock) -> None:
    write_two_steps(tmp_path, clock).close()
    first, second = read_timeline(tmp_path)
    assert (first.step, second.step) == (1, 2)
    assert first.phases == [
        ("publish", 0, 1),
        ("generate", 1, 2),
        ("update", 2, 3),
        ("save", 3.5, 4.5),
        ("eval", 5.5, 6.5),
    ]
    assert second.phases == [("publish", 4.5, 5.5), ("generate", 6.5, 7.5)]
    assert first.spans["start_s"] == [11, 11, 12] and first.spans["end"] == ["stop", "paused", "length"]
    assert first.admitted == ["0:0"] and first.dropped == [("0:1", "rejected[x]")]
    assert second.spans["kind"] == ["resumed"] and second.admitted == ["0:2"] and second.dropped == []
    assert set(second.spans) == set(COLUMNS)


@pytest.mark.parametrize(
    ("time_s", "left"),
    [
        (0.0, []),
        (3.0, ["publish", "generate", "update"]),
        (4.5, ["publish", "generate", "update", "save"]),
        (7.5, ["publish", "generate", "update", "save", "eval", "publish", "generate"]),
    ],
)
def test_a_resume_forgets_what_came_later(tmp_path: Path, clock: Clock, time_s: float, left: list[str]) -> None:
    write_two_steps(tmp_path, clock).close()
    again = TimelineWriter(tmp_path, clock)
    again.rewind(time_s)
    assert [name for step in read_timeline(tmp_path) for name, *_ in step.phases] == left
    again.phase("publish", 2)
    clock.now += 1
    again.log(2)
    again.close()
    assert read_timeline(tmp_path)[-1].phases[-1][0] == "publish"


def test_a_torn_line_is_not_read(tmp_path: Path, clock: Clock) -> None:
    write_two_steps(tmp_path, clock).close()
    path = tmp_path / "timeline.jsonl"
    path.write_text(path.read_text()[:-10])
    steps = read_timeline(tmp_path)
    assert [step.step for step in steps] == [1]


def test_a_folder_without_a_timeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"timeline: got 'nothing at"):
        read_timeline(tmp_path)


def test_concurrency_changes_where_samples_come_and_go() -> None:
    assert concurrency([1, 1, 2], [2, 4, 4]) == [(1, 2), (4, 0)]  # at 2 one ends and one starts
    assert concurrency([1, 3], [2, 4]) == [(1, 1), (2, 0), (3, 1), (4, 0)]
    assert concurrency([], []) == []


SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=40
)


@given(SPANS)
def test_slots_never_overlap_and_are_no_more_than_needed(spans: list[tuple[int, int]]) -> None:
    starts, ends = [s for s, _ in spans], [e for _, e in spans]
    slots = assign_slots(starts, ends)
    for slot in set(slots):
        row = sorted(span for span, of in zip(spans, slots, strict=True) if of == slot)
        assert all(a[1] <= b[0] for a, b in zip(row, row[1:], strict=False))
    most = max((sum(s <= t < e for s, e in spans) for t in range(60)), default=0)
    assert len(set(slots)) == most


def test_the_trace_is_what_perfetto_reads(tmp_path: Path, clock: Clock) -> None:
    """The JSON trace format: complete events with ts and dur in microseconds, flows bound to slices, counters."""
    write_two_steps(tmp_path, clock).close()
    out = tmp_path / "trace.json.gz"
    num_events = write_trace(tmp_path, out)
    trace = json.loads(gzip.decompress(out.read_bytes()))
    events = trace["traceEvents"]
    assert len(events) == num_events
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {(0, "loop"), (1, "engine 0")}
    slices = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in slices if e["pid"] == 0][:2] == [
        ("publish", 0, 10**6),
        ("generate", 10**6, 10**6),
    ]
    stays = {(e["name"], e["ts"]): e for e in slices if e["pid"] == 1}
    interrupted, resumed = stays["0:0/1", 11 * 10**6], stays["0:0/1", 16 * 10**6]
    assert interrupted["args"]["end"] == "paused" and interrupted["args"]["group"] == "trained"
    assert stays["0:1/0", 12 * 10**6]["args"]["group"] == "rejected[x]"
    start, finish = (e for e in events if e["ph"] in "sf")
    assert start["id"] == finish["id"] and start["ph"] == "s" and finish["bp"] == "e"
    assert interrupted["ts"] <= start["ts"] < interrupted["ts"] + interrupted["dur"]
    assert (start["tid"], finish["tid"]) == (interrupted["tid"], resumed["tid"]) and finish["ts"] == resumed["ts"]
    counts = [(e["ts"], e["args"]["running"]) for e in events if e["ph"] == "C"]
    assert counts == [(11 * 10**6, 2), (14 * 10**6, 0), (16 * 10**6, 1), (17 * 10**6, 0)]


def test_a_trace_that_cannot_be_written_is_said(tmp_path: Path, clock: Clock) -> None:
    write_two_steps(tmp_path, clock).close()
    with pytest.raises(RunError, match="trace: got"):
        write_trace(tmp_path, tmp_path / "absent/trace.json")
