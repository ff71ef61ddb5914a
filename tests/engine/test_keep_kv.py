"""Requests that stay in the real vLLM over a publication: what is kept, what is not, and who never sees old KV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlpost.engine.vllm import VLLMEngine
from tests.engine.conftest import MAX_MODEL_LEN, MAX_SLOTS, build_vllm_engine
from tests.engine.test_engine_contract import (
    BLOCK,
    GREEDY,
    Harvest,
    a_request,
    publish,
    reference_logprobs,
    run,
    tokens,
)

pytestmark = pytest.mark.own_process
SEQUENCES = 4  # of full length, in the KV cache; with three blocks each


@pytest.fixture(scope="module")
def keeping_engine(model_folder: Path) -> Iterator[VLLMEngine]:
    engine = build_vllm_engine(model_folder, kv_sequences=SEQUENCES, keep_kv=True)
    yield engine
    engine.shutdown()


@pytest.fixture
def engine(keeping_engine: VLLMEngine, old_model: Any) -> Iterator[VLLMEngine]:
    """With the old model's weights, and nothing in it."""
    keeping_engine.abort_all()
    publish(keeping_engine, old_model)
    yield keeping_engine
    keeping_engine.abort_all()


def resume(engine: VLLMEngine, harvest: Harvest, steps: int = 10_000) -> int:
    """Steps to the end; returns the prefilled tokens."""
    prefilled = 0
    for _ in range(steps):
        if not engine.num_in_flight:
            break
        step = engine.step()
        harvest.add(step.deltas)
        prefilled += step.num_prefill_tokens
    return prefilled


@pytest.mark.parametrize("sampling", [GREEDY, None], ids=["greedy", "sampled"])
def test_kept_over_a_publication_of_the_same_weights_nothing_changes(
    engine: VLLMEngine, old_model: Any, sampling: Any
) -> None:
    requests = [a_request(f"r{i}", tokens(9 + i, seed=i), new=40, seed=i, sampling=sampling) for i in range(4)]
    whole = run(engine, requests)
    harvest = run(engine, requests, steps=11)
    harvest.add(engine.pause_all().deltas)
    assert engine.num_in_flight == 0 and all(len(ids) == 11 for ids in harvest.token_ids.values())
    engine.sleep()
    engine.wake()
    publish(engine, old_model)
    sequence = tokens(60)
    scored = engine.score([sequence])[0]  # the canary, with four paused beside it
    assert len(scored) == 59 and all(len(ids) == 11 for ids in harvest.token_ids.values())
    assert sorted(engine.resume()) == ["r0", "r1", "r2", "r3"] and engine.num_in_flight == 4
    assert resume(engine, harvest) == 0, "something was computed again"
    assert harvest.token_ids == whole.token_ids and harvest.finish == whole.finish
    for name, logprobs in whole.logprobs.items():
        np.testing.assert_allclose(harvest.logprobs[name], logprobs, atol=1e-5)


def test_tokens_after_other_weights_are_sampled_by_them_over_old_keys_and_values(
    engine: VLLMEngine, new_model: Any
) -> None:
    prompt = tokens(2 * BLOCK + 9)
    harvest = run(engine, [a_request("kept", prompt, new=40)], steps=11)
    harvest.add(engine.pause_all().deltas)
    publish(engine, new_model)
    engine.resume()
    engine.submit([a_request("fresh", prompt, new=29, seed=5)])  # the same prompt: two of its blocks are there, but old
    resume(engine, harvest)
    kept = reference_logprobs(new_model, prompt, harvest.token_ids["kept"], a_request().sampling)[11:]
    fresh = reference_logprobs(new_model, prompt, harvest.token_ids["fresh"], a_request().sampling)
    np.testing.assert_allclose(harvest.logprobs["fresh"], fresh, atol=1e-4)
    assert np.abs(np.array(harvest.logprobs["kept"][11:]) - kept).mean() > 0.01, "clean, or from the old weights alone?"
    old = reference_logprobs(new_model, prompt, harvest.token_ids["kept"], a_request().sampling)[:11]
    assert np.abs(np.array(harvest.logprobs["kept"][:11]) - old).mean() > 0.01


def test_a_prefix_hit_within_a_publication_stays_one(engine: VLLMEngine) -> None:
    prompt = tokens(BLOCK + 20, seed=3)
    run(engine, [a_request("first", prompt, new=2)])
    engine.submit([a_request("second", prompt, new=2)])
    assert resume(engine, Harvest()) < BLOCK


def test_an_abort_ends_the_paused_and_frees_what_they_held(engine: VLLMEngine) -> None:
    requests = [a_request(f"r{i}", tokens(150, seed=i), new=40, seed=i) for i in range(3)]
    whole = run(engine, requests)
    run(engine, requests, steps=5)
    engine.pause_all()
    assert list(engine.step().deltas) == [], "a paused request went on"
    engine.abort_all()
    assert engine.resume() == [] and engine.num_in_flight == 0
    assert run(engine, requests).token_ids == whole.token_ids
    assert engine.step().kv_usage == 0.0


def test_where_the_cache_is_full_the_latest_are_ended_so_that_a_sequence_has_room(engine: VLLMEngine) -> None:
    requests = [a_request(f"r{i}", tokens(130, seed=i), new=100, seed=i) for i in range(MAX_SLOTS)]
    harvest = run(engine, requests, steps=3)  # six of two blocks each fill twelve; two wait
    assert len(harvest.token_ids) == 6
    engine.pause_all()
    assert len(engine.score([tokens(MAX_MODEL_LEN - 1)])[0]) == MAX_MODEL_LEN - 2
    kept = engine.resume()
    assert sorted(kept) == ["r0", "r1", "r2", "r3"]  # eight blocks; three are a full sequence's
    engine.submit([r for r in requests if r.request_id not in kept])  # as ended ones may be
    rest = Harvest()
    resume(engine, rest)
    assert sorted(rest.finish) == sorted(r.request_id for r in requests)
