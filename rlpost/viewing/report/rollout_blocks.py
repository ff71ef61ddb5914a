"""The rollouts as compressed blocks for the page, and an index of them. Sampled evenly if there are too many.

Whole groups are taken, in an order whose every prefix is spread evenly over the steps, until the space is used up. So a
page that shows all of them and one that shows a tenth are built the same way, and a group is never split. Called by
``build``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.rewards.scoring import failure_kind
from rlpost.viewing.report import tokens
from rlpost.viewing.report.blocks import Blocks, encode

Row = dict[str, Any]
Decode = Callable[[int], str]

BLOCK_TOKENS = 60_000  # response tokens of one block: about 100 kB, inflated in milliseconds
PILOT_GROUPS = 40
INDEX_BYTES = 15  # of one rollout in the index; 5 to 6 were measured, failures and unusual rewards take more
MARGIN = 0.9  # of the space, so that data that compresses worse than the pilot still fits
MAX_FAILURE_CHARACTERS = 500
COLUMNS = [
    *("uid", "index", "prompt", "response", "token_ids", "policy_versions", "rollout_logprobs", "reward"),
    *("reward_parts", "finish_reason", "failure", "advantage"),
]
OPTIONAL = ["old_logprobs"]  # missing in files of earlier versions
INDEX = (
    *("step", "group", "index", "reward", "advantage", "length", "oldest", "newest", "span", "finish", "failure"),
    *("block", "position"),  # where its text is: the block, and the group's position in it
)


@dataclass(kw_only=True, slots=True)
class Rollouts:
    """``index`` has one entry per rollout on the page, in columns; ``groups`` the uid of each group."""

    index: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in INDEX})
    groups: list[str] = field(default_factory=list)
    num_rollouts: int = 0  # in the files
    tokens_shown: bool = False  # whether single tokens can be distinguished in the text
    differences_shown: bool = False  # whether the trainer's logprobs are known for any of them

    @property
    def num_shown(self) -> int:
        return len(self.index["step"])


def rollout_files(run: Path) -> list[tuple[int, Path]]:
    """(step, file), oldest first."""
    files = (run / "rollouts").glob("step-*.parquet")
    return sorted((int(file.stem.removeprefix("step-")), file) for file in files)


def lengths_by_step(run: Path) -> Iterator[tuple[int, list[int]]]:
    """Response lengths of every sample that was trained."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    for step, file in rollout_files(run):
        table = parquet.read_table(file, columns=["token_ids", "reward"])
        lengths = compute.list_value_length(table["token_ids"]).to_pylist()
        yield step, [n for n, reward in zip(lengths, table["reward"].to_pylist(), strict=True) if reward is not None]


def pack_rollouts(run: Path, blocks: Blocks, max_bytes: int) -> Rollouts:
    """Adds blocks to ``blocks``, in step order, that take at most ``max_bytes``, including the index."""
    tokenizer = tokens.find_tokenizer(run)
    decode = tokens.load_decoder(tokenizer) if tokenizer is not None else None
    rollouts = Rollouts(tokens_shown=decode is not None)
    places = _list_groups(run)
    rollouts.num_rollouts = sum(place.num_rows for place in places)
    room = max_bytes
    for chunk in _chunks(_read_groups(_choose(places, decode, max_bytes))):
        number = blocks.add([_pack_group(rows, decode) for _, rows in chunk], room)
        if number is None:
            break
        room -= len(blocks.texts[number]) + INDEX_BYTES * sum(len(rows) for _, rows in chunk)
        for position, (step, rows) in enumerate(chunk):
            _index_group(rollouts, step, rows, (number, position))
            rollouts.differences_shown |= any(row.get("old_logprobs") is not None for row in rows)
    return rollouts


@dataclass(frozen=True, slots=True)
class _Place:
    """One group: rows ``start`` to ``start + num_rows`` of its step's file."""

    step: int
    file: Path
    start: int
    num_rows: int
    num_tokens: int


def _list_groups(run: Path) -> list[_Place]:
    """All groups in the order in which they are taken: in every prefix of it, all steps have nearly equal shares."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    ranked: list[tuple[float, _Place]] = []
    for nth, (step, file) in enumerate(rollout_files(run)):
        table = parquet.read_table(file, columns=["uid", "token_ids"])
        lengths = compute.list_value_length(table["token_ids"]).to_pylist()
        places, start = [], 0
        for _, members in groupby(table["uid"].to_pylist()):
            num_rows = sum(1 for _ in members)
            places.append(_Place(step, file, start, num_rows, sum(lengths[start : start + num_rows])))
            start += num_rows
        ranked += [((n + spread(nth)) / len(places), place) for n, place in enumerate(places)]
    return [place for _, place in sorted(ranked, key=lambda pair: pair[0])]


def spread(number: int) -> float:
    """The bits of ``number`` mirrored at the point (van der Corput): 0, 1/2, 1/4, 3/4, 1/8, ...: even at any length."""
    value, share = 0.0, 0.5
    while number:
        value += share * (number & 1)
        number, share = number >> 1, share / 2
    return value


def _choose(places: Sequence[_Place], decode: Decode | None, max_bytes: int) -> list[_Place]:
    """As many groups as ``max_bytes`` should hold, estimated from how well the first ones compress, ordered by step."""
    pilot = places[:PILOT_GROUPS]
    if not pilot:
        return []
    packed = [_pack_group(rows, decode) for _, rows in _read_groups(pilot)]
    bytes_per_token = len(encode(packed)) / max(1, sum(place.num_tokens for place in pilot))
    needed = np.cumsum([bytes_per_token * place.num_tokens + INDEX_BYTES * place.num_rows for place in places])
    num_fitting = int(np.searchsorted(needed, MARGIN * max_bytes, side="right"))
    return sorted(places[:num_fitting], key=lambda place: (place.step, place.start))


def _read_groups(places: Sequence[_Place]) -> Iterator[tuple[int, list[Row]]]:
    """(step, rows) of each group; a file is read once if its groups follow each other."""
    import pyarrow.parquet as parquet

    for file, members in groupby(places, key=lambda place: place.file):
        names = parquet.read_schema(file).names
        table = parquet.read_table(file, columns=[*COLUMNS, *(name for name in OPTIONAL if name in names)])
        for place in members:
            yield place.step, table.slice(place.start, place.num_rows).to_pylist()


def _chunks(groups: Iterable[tuple[int, list[Row]]]) -> Iterator[list[tuple[int, list[Row]]]]:
    chunk: list[tuple[int, list[Row]]] = []
    size = 0
    for step, rows in groups:
        chunk.append((step, rows))
        size += sum(len(row["token_ids"]) for row in rows)
        if size >= BLOCK_TOKENS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pack_group(rows: Sequence[Row], decode: Decode | None) -> dict[str, Any]:
    return {"prompt": rows[0]["prompt"], "samples": [_pack_sample(row, decode) for row in rows]}


def _pack_sample(row: Row, decode: Decode | None) -> dict[str, Any]:
    """``pieces``: characters of each token. ``versions``: [policy version, tokens] in sequence."""
    rollout, old = np.asarray(row["rollout_logprobs"], np.float64), row.get("old_logprobs")
    pieces = [decode(token) for token in row["token_ids"]] if decode is not None else None
    return {
        "text": row["response"],
        "pieces": tokens.piece_lengths(row["response"], pieces) if pieces is not None else None,
        "logprobs": tokens.encode_logprobs(rollout),
        "differences": tokens.encode_differences(np.asarray(old, np.float64) - rollout) if old is not None else None,
        "versions": [[version, sum(1 for _ in run)] for version, run in groupby(row["policy_versions"])],
        "parts": _finite_parts(row["reward_parts"]),
        "failure": row["failure"] and row["failure"][:MAX_FAILURE_CHARACTERS],
    }


def _finite_parts(text: str) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in json.loads(text).items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _index_group(rollouts: Rollouts, step: int, rows: Sequence[Row], where: tuple[int, int]) -> None:
    rollouts.groups.append(rows[0]["uid"])
    for row in rows:
        versions = row["policy_versions"]
        values = {
            "step": step,
            "group": len(rollouts.groups) - 1,
            "index": row["index"],
            "reward": _finite(row["reward"]),
            "advantage": _finite(row["advantage"]),
            "length": len(versions),
            "oldest": min(versions, default=None),
            "newest": max(versions, default=None),
            "span": len(set(versions)),
            "finish": row["finish_reason"],
            "failure": failure_kind(row["failure"]) if row["failure"] else None,
            "block": where[0],
            "position": where[1],
        }
        for name in INDEX:
            rollouts.index[name].append(values[name])
