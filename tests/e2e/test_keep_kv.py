"""A real run that keeps its KV cache over updates and has little of it, killed once: marks, mismatch, account."""

from __future__ import annotations

import re

import pytest

from .lives import KILLED, Nursery, Place
from .program import SMALL, rollouts_of, steps_of

BLOCK_BYTES = 128 * 2 * 4 * 4 * 32 * 4  # 128 tokens, key and value, 4 layers, 4 heads of 32 numbers in float32
SEQUENCES = 10  # of two blocks each, of 16 slots; vLLM keeps one block for itself
RUN = ["train", "recipe=math/arithmetic", *SMALL, "steps=6", "name=kept", "eval.every=4", "checkpoint.every=3"]
RUN += ["rollout.keep_kv=true", f"engine.kv_cache_bytes={(2 * SEQUENCES + 1) * BLOCK_BYTES}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Killed in its fifth step, after the checkpoint of the third."""
    folder = tmp_path_factory.mktemp("kept")
    with Nursery(folder) as nursery:
        first = nursery.live(*RUN, place=Place("rlpost.rollout.buffer:RolloutBuffer.settle", nth=5))
        assert first.status == KILLED, first.output
        last = nursery.live(*RUN)
        assert last.status == 0, last.output
    return folder / "runs/kept", first.output, last.output


def test_samples_go_on_with_their_kv_cache_and_after_a_kill_or_an_evaluation_they_replay(run):
    rows = steps_of(run[0])
    kept, resumed = ([int(row[f"rollout/{name}_samples"]) for row in rows] for name in ("kept", "resumed"))
    assert len(rows) == 6
    assert [n > 0 for n in kept] == [False, True, True, False, False, True], "killed after 3, evaluated after 4"
    assert resumed[3] > 0 and resumed[4] > 0


def test_their_tokens_are_marked_and_their_mismatch_is_told_apart(run):
    path, marked = run[0], 0
    for step, samples in rollouts_of(path).items():
        for sample in samples:
            mixed = [v for v, m in zip(sample["policy_versions"], sample["mixed_kv"], strict=True) if m]
            assert sample["policy_versions"][0] not in mixed and not {3, 4} & {*mixed}, (step, sample["uid"])
            marked += len(mixed)
    assert marked > 20
    rows = [row for row in steps_of(path) if "mismatch/mixed_kv/abs_log_ratio" in row]
    assert rows and sum(row["mismatch/mixed_kv/token_share"] * row["loss/tokens"] for row in rows) == pytest.approx(
        marked
    )
    clean = max(row.get("mismatch/lag_0/abs_log_ratio", 0.0) for row in rows)
    mixed = [row["mismatch/mixed_kv/abs_log_ratio"] for row in rows]
    assert 0 < clean < 1e-6 and min(mixed) > 3 * clean and max(mixed) > 100 * clean, (clean, mixed)


def test_the_samples_in_flight_follow_what_the_cache_holds(run):
    path, first, _ = run
    assert f"step 1: {SEQUENCES} samples in flight: the KV cache of {2 * SEQUENCES * 128:,} tokens holds" in first
    assert re.search(r"step 2: \d+ samples in flight: .* holds 10 .* of the lengths seen", first), first
    rows = steps_of(path)
    assert rows[0]["rollout/slots"] == SEQUENCES < rows[1]["rollout/slots"] <= 16
    assert rows[3]["rollout/slots"] > SEQUENCES, "the lengths seen were forgotten in the resume"
    assert all(0 < row["rollout/kv_usage_max"] <= 1 for row in rows)
    assert rows[0]["rollout/preemptions"] == 0, "full length never interrupts"
