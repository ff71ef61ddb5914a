"""The timeline as compressed blocks of consecutive steps; evenly spaced blocks if there are too many.

Called by ``build``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlpost.reporting.timeline import StepTimeline
from rlpost.viewing.report.blocks import Blocks
from rlpost.viewing.report.rollout_blocks import spread

BLOCK_SPANS = 4000
COLUMNS = ("index", "replica", "policy_version", "start_s", "end_s", "tokens", "kind", "end")


def pack_timeline(timeline: Sequence[StepTimeline], blocks: Blocks, max_bytes: int) -> list[dict[str, Any]]:
    """Adds blocks of at most ``max_bytes`` in total; returns {first, last, block} in step order.

    ``block`` is None for steps that did not fit.
    """
    chunks = list(_chunks(timeline))
    order = sorted(range(len(chunks)), key=spread)
    numbers: dict[int, int] = {}
    room = max_bytes
    for position in order:
        number = blocks.add([_pack_step(step) for step in chunks[position]], room)
        if number is not None:
            room -= len(blocks.texts[number])
            numbers[position] = number
    return [
        {"first": chunk[0].step, "last": chunk[-1].step, "block": numbers.get(position)}
        for position, chunk in enumerate(chunks)
    ]


def _chunks(timeline: Sequence[StepTimeline]) -> Iterator[list[StepTimeline]]:
    chunk: list[StepTimeline] = []
    size = 0
    for step in timeline:
        chunk.append(step)
        size += len(step.spans["uid"])
        if size >= BLOCK_SPANS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pack_step(step: StepTimeline) -> dict[str, Any]:
    """Uids are long and repeat: ``groups`` has each once, ``spans.group`` refers to it. Times to the millisecond."""
    groups = list(dict.fromkeys(step.spans["uid"]))
    number = {uid: n for n, uid in enumerate(groups)}
    spans = {name: list(step.spans[name]) for name in COLUMNS}
    for name in ("start_s", "end_s"):
        spans[name] = [round(seconds, 3) for seconds in spans[name]]
    return {
        "step": step.step,
        "phases": [[name, round(start, 3), round(end, 3)] for name, start, end in step.phases],
        "groups": groups,
        "spans": {"group": [number[uid] for uid in step.spans["uid"]], **spans},
        "admitted": step.admitted,
        "dropped": step.dropped,
    }
