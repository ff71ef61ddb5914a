"""Rollouts and timeline as blocks: everything where it fits, an even sample of whole groups where it does not."""

import base64
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from rlpost.reporting.timeline import read_timeline
from rlpost.viewing.report.blocks import Blocks, encode
from rlpost.viewing.report.rollout_blocks import pack_rollouts, spread
from rlpost.viewing.report.timeline_blocks import pack_timeline

from .making import make_run


def decode(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", steps=40, groups_per_step=8, mean_length=80)


def test_a_block_is_refused_where_it_does_not_fit() -> None:
    blocks = Blocks()
    size = len(encode("x" * 100))
    assert blocks.add("x" * 100, room=size) == 0
    assert blocks.add("x" * 100, room=size - 1) is None and len(blocks.texts) == 1
    assert decode(blocks.texts[0]) == "x" * 100
    with pytest.raises(ValueError):
        encode(float("nan"))


def test_all_rollouts_come_back_as_they_were_written(run: Path) -> None:
    blocks = Blocks()
    rollouts = pack_rollouts(run, blocks, 10**8)
    assert rollouts.num_shown == rollouts.num_rollouts == 40 * 8 * 4
    index = rollouts.index
    assert index["step"] == sorted(index["step"])
    written = parquet.read_table(run / "rollouts" / "step-000007.parquet").to_pylist()
    rows = [row for row, step in enumerate(index["step"]) if step == 7]
    assert len(rows) == len(written)
    for row, expected in zip(rows, written, strict=True):
        group = decode(blocks.texts[index["block"][row]])[index["position"][row]]
        sample = group["samples"][index["index"][row]]
        assert rollouts.groups[index["group"][row]] == expected["uid"]
        assert (group["prompt"], sample["text"]) == (expected["prompt"], expected["response"])
        assert [v for v, n in sample["versions"] for _ in range(n)] == expected["policy_versions"]
        assert sample["pieces"] == [1] * len(expected["token_ids"]) and len(sample["logprobs"]) == index["length"][row]
        assert (index["reward"][row], index["span"][row]) == (expected["reward"], len({*expected["policy_versions"]}))


@pytest.mark.parametrize("share", [0.6, 0.25, 0.05])
def test_a_sample_is_even_whole_and_within_its_room(run: Path, share: float) -> None:
    whole, part = Blocks(), Blocks()
    pack_rollouts(run, whole, 10**8)
    room = int(share * whole.num_bytes)
    rollouts = pack_rollouts(run, part, room)
    assert part.num_bytes <= room
    assert 0.6 * share < rollouts.num_shown / rollouts.num_rollouts < 1.2 * share
    by_step = Counter(rollouts.index["step"])
    if share > 0.2:
        groups = [by_step[step] / 4 for step in range(1, 41)]
        assert max(groups) - min(groups) <= 1
    assert set(Counter(rollouts.index["group"]).values()) == {4}


def test_no_room_is_no_rollout(run: Path) -> None:
    blocks = Blocks()
    rollouts = pack_rollouts(run, blocks, 100)
    assert (rollouts.num_shown, rollouts.num_rollouts, blocks.texts) == (0, 1280, [])


def test_every_beginning_of_the_order_is_even() -> None:
    assert [spread(n) for n in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


def test_the_timeline_comes_back(run: Path) -> None:
    blocks, timeline = Blocks(), read_timeline(run)
    parts = pack_timeline(timeline, blocks, 10**8)
    steps = [step for part in parts for step in decode(blocks.texts[part["block"]])]
    assert [step["step"] for step in steps] == list(range(1, 41))
    spans, original = steps[11]["spans"], timeline[11].spans
    assert [steps[11]["groups"][group] for group in spans["group"]] == original["uid"]
    assert (spans["tokens"], spans["end"], spans["kind"]) == (original["tokens"], original["end"], original["kind"])
    assert steps[11]["admitted"] == timeline[11].admitted


def test_of_a_timeline_too_large_the_page_says_which_steps_are_there(run: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("rlpost.viewing.report.timeline_blocks.BLOCK_SPANS", 100)
    whole, part = Blocks(), Blocks()
    timeline = read_timeline(run)
    assert all(piece["block"] is not None for piece in pack_timeline(timeline, whole, 10**8))
    pieces = pack_timeline(timeline, part, whole.num_bytes // 2)
    missing = [piece["block"] is None for piece in pieces]
    assert part.num_bytes <= whole.num_bytes // 2
    assert 0.3 < sum(missing) / len(missing) < 0.7
    assert [piece["first"] for piece in pieces] == sorted(piece["first"] for piece in pieces)
