"""What any engine must do, run on the real vLLM with a tiny random model; the reference is transformers, in full.

Tests that take only ``engine`` speak the protocol and hold for every engine; those that take a model compare numbers.
"""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.engine import kv_budget as kv_cache
from rlpost.engine import vllm as vllm_engine
from rlpost.engine.protocol import Delta, EngineStep, EngineWork, Request, SamplingSettings
from rlpost.errors import ModelError, RunError
from tests.engine.conftest import ASYNC, KV_SEQUENCES, MAX_MODEL_LEN, MAX_SLOTS, MODEL
from tests.random_models import EOS, VOCABULARY

pytestmark = pytest.mark.own_process

GREEDY = SamplingSettings(temperature=0.0)
BLOCK = 128  # tokens of a prefix-cache block on a CPU


# ---- what the tests do again and again


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)


def a_request(
    name: str = "r",
    prompt: np.ndarray | None = None,
    new: int = 16,
    seed: int = 1,
    sampling: SamplingSettings | None = None,
) -> Request:
    prompt = tokens(9) if prompt is None else prompt
    return Request(
        request_id=name, parts=(prompt,), max_new_tokens=new, seed=seed, sampling=sampling or SamplingSettings()
    )


class Harvest:
    """Collects deltas and holds the engine to: each token once, nothing after the end."""

    def __init__(self) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.finish: dict[str, str] = {}

    def add(self, deltas: Sequence[Delta]) -> None:
        for d in deltas:
            assert d.request_id not in self.finish, "a delta after the request's end"
            assert len(d.token_ids) == len(d.logprobs)
            assert d.finish_reason in ("", "stop", "length")
            self.token_ids.setdefault(d.request_id, []).extend(d.token_ids.tolist())
            self.logprobs.setdefault(d.request_id, []).extend(d.logprobs.tolist())
            if d.finish_reason:
                self.finish[d.request_id] = d.finish_reason


def run(engine: Any, requests: Sequence[Request], steps: int = 10_000) -> Harvest:
    """Submit, step until idle (or for so many steps), and return everything handed over."""
    harvest = Harvest()
    engine.submit(requests)
    for _ in range(steps):
        if not engine.num_in_flight:
            break
        harvest.add(engine.step().deltas)
    return harvest


def first_delta(engine: Any, request: Request) -> tuple[int, Delta]:
    """(tokens prefilled, the first delta) of a request that is alone."""
    engine.submit([request])
    prefilled, deltas = 0, []
    while not deltas:
        step = engine.step()
        prefilled, deltas = prefilled + step.num_prefill_tokens, list(step.deltas)
    (delta,) = deltas
    return prefilled, delta


def full_logits(model: Any, sequence: Sequence[int]) -> Any:
    """f64[len, vocabulary]: row t predicts token t + 1."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(sequence)]), use_cache=False).logits[0].double()


def reference_logprobs(model: Any, prompt: np.ndarray, response: Sequence[int], s: SamplingSettings) -> list[float]:
    """Of the distribution sampled from: temperature, then the k most likely, then the nucleus, renormalised."""
    logits = full_logits(model, [*prompt.tolist(), *response])[len(prompt) - 1 : -1].numpy()
    values = []
    for row, token in zip(logits / s.temperature, response, strict=True):
        order = np.argsort(-row)
        if s.top_k:
            order = order[: s.top_k]
        probabilities = np.exp(row[order] - row[order].max())
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities  # mass of the more likely ones
        kept = order[before < s.top_p]
        assert token in kept, "sampled a token outside the nucleus"
        values.append(row[token] - math.log(np.exp(row[kept]).sum()))
    return values


def reference_scores(model: Any, sequence: np.ndarray) -> np.ndarray:
    import torch

    rows = torch.log_softmax(full_logits(model, sequence.tolist())[:-1], dim=-1).numpy()
    return rows[np.arange(len(sequence) - 1), sequence[1:]]


def named(model: Any) -> list[tuple[str, Any]]:
    return [(name, p.detach()) for name, p in model.named_parameters()]


def publish(engine: Any, model: Any) -> None:
    engine.load_weights([named(model)])


@pytest.fixture
def published(engine: Any, old_model: Any) -> Iterator[Any]:
    """For tests that load other weights: the model the engine started with is back afterwards."""
    yield engine
    engine.abort_all()
    publish(engine, old_model)


# ---- requests, steps and deltas


def test_every_token_is_handed_over_once_and_the_length_limit_is_exact(engine: Any) -> None:
    limits = {f"r{i}": 1 + 3 * i for i in range(MAX_SLOTS)}
    harvest = run(engine, [a_request(name, new=limit, seed=limit) for name, limit in limits.items()])
    assert {name: len(ids) for name, ids in harvest.token_ids.items()} == limits
    assert set(harvest.finish.values()) == {"length"}
    assert engine.num_in_flight == 0


def test_an_idle_engine_steps_to_nothing(engine: Any) -> None:
    step = engine.step()
    assert (list(step.deltas), step.num_running, step.num_prefill_tokens) == ([], 0, 0)


def test_stop_tokens_end_a_response_and_belong_to_it(engine: Any) -> None:
    stops = tuple(range(0, VOCABULARY, 6))
    sampling = SamplingSettings(temperature=1.0, stop_token_ids=stops)
    harvest = run(engine, [a_request(f"r{i}", new=200, seed=i, sampling=sampling) for i in range(MAX_SLOTS)])
    for name, ids in harvest.token_ids.items():
        assert harvest.finish[name] == "stop"
        assert ids[-1] in stops
        assert not set(ids[:-1]) & set(stops)


def test_only_the_given_stop_tokens_stop(engine: Any) -> None:
    """The model's own end token is an ordinary one unless the settings name it."""
    sampling = SamplingSettings(temperature=2.0)
    harvest = run(engine, [a_request(f"r{i}", new=60, seed=i, sampling=sampling) for i in range(MAX_SLOTS)])
    assert any(EOS in ids[:-1] for ids in harvest.token_ids.values())
    assert set(harvest.finish.values()) == {"length"}


def test_a_freed_slot_is_refilled_while_others_run(engine: Any) -> None:
    harvest = Harvest()
    engine.submit([a_request("short", new=2), *(a_request(f"long{i}", new=12, seed=i) for i in range(3))])
    steps: list[EngineStep] = []
    while engine.num_in_flight:
        step = engine.step()
        harvest.add(step.deltas)
        steps.append(step)
        if "short" in harvest.finish and "refill" not in harvest.token_ids and engine.num_in_flight == 3:
            engine.submit([a_request("refill", new=12, seed=9)])
    assert {name: len(ids) for name, ids in harvest.token_ids.items()} == {
        "short": 2, "long0": 12, "long1": 12, "long2": 12, "refill": 12,
    }  # fmt: skip
    running = [step.num_running for step in steps if step.num_running]
    if ASYNC:  # a batch is under way when the end of the one before is seen
        assert max(running) == 4 and len(running) <= 16, running
    else:  # 12 steps of the long ones, the refill joins in the third: 4 4 | 4 x 10 | 1 1
        assert running == [4] * 12 + [1] * 2
    assert sum(step.duration_s for step in steps) > 0


def test_the_clock_runs_forward(engine: Any) -> None:
    before = engine.now()
    run(engine, [a_request(new=2)])
    assert engine.now() > before


def test_prefill_counts_the_prompt_and_leaves_prefix_hits_out(published: Any, old_model: Any) -> None:
    publish(published, old_model)  # empties the prefix cache
    prompt = tokens(2 * BLOCK + 10, seed=3)

    def prefills(request: Request) -> list[int]:
        published.submit([request])
        return [published.step().num_prefill_tokens for _ in range(request.max_new_tokens)]

    assert prefills(a_request("cold", prompt, new=3)) == [len(prompt), 0, 0]
    assert prefills(a_request("warm", prompt, new=3)) == [10, 0, 0]
    changed = prompt.copy()
    changed[BLOCK] = (changed[BLOCK] + 1) % VOCABULARY  # the second block differs
    assert prefills(a_request("half", changed, new=2)) == [BLOCK + 10, 0]


# ---- abort and resume


def test_abort_keeps_every_token_and_leaves_nothing_in_flight(engine: Any) -> None:
    requests = [a_request(f"r{i}", new=40, seed=i) for i in range(MAX_SLOTS)]
    whole = run(engine, requests)
    harvest = run(engine, requests, steps=7)
    harvest.add(engine.abort_all().deltas)
    assert engine.num_in_flight == 0
    assert list(engine.step().deltas) == []
    seen = 6 if ASYNC else 7  # the abort drops the batch under way, before anything of it was handed over
    assert all(len(ids) == seen for ids in harvest.token_ids.values())
    for name, ids in harvest.token_ids.items():
        assert ids == whole.token_ids[name][:seen]
        np.testing.assert_allclose(harvest.logprobs[name], whole.logprobs[name][:seen], atol=1e-5)
    again = run(engine, requests)  # the same ids may be used again
    assert again.token_ids == whole.token_ids


def test_requests_are_aborted_in_the_same_order_in_every_process(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM puts the ids of one call into a set of random names: KV would be freed, and later evicted, in an order that
    members of one engine do not share."""
    engine.submit([a_request(name, seed=n) for n, name in enumerate("cabd")])
    engine.step()
    aborted: list[list[str]] = []
    abort = engine._engine.abort_request
    monkeypatch.setattr(engine._engine, "abort_request", lambda ids: (aborted.append(list(ids)), abort(ids)))
    engine.abort_all()
    assert aborted == [["a"], ["b"], ["c"], ["d"]]


def test_requests_aborted_before_their_first_step_have_no_tokens(engine: Any) -> None:
    engine.submit([a_request("never")])
    harvest = Harvest()
    harvest.add(engine.abort_all().deltas)
    assert (harvest.token_ids, engine.num_in_flight) == ({}, 0)
    assert len(run(engine, [a_request("next", new=3)]).token_ids["next"]) == 3


def test_a_greedy_response_resumed_by_token_ids_equals_the_uninterrupted_one(engine: Any) -> None:
    prompts = [tokens(5 + 3 * i, seed=i) for i in range(4)]
    whole = run(engine, [a_request(f"r{i}", p, new=30, sampling=GREEDY) for i, p in enumerate(prompts)])
    first = run(engine, [a_request(f"r{i}", p, new=30, sampling=GREEDY) for i, p in enumerate(prompts)], steps=11)
    first.add(engine.abort_all().deltas)
    rest = []
    for i, p in enumerate(prompts):
        so_far = first.token_ids[f"r{i}"]
        resumed = np.concatenate([p, np.asarray(so_far, np.int32)])
        rest.append(a_request(f"r{i}", resumed, new=30 - len(so_far), seed=2, sampling=GREEDY))
    second = run(engine, rest)
    for name, ids in whole.token_ids.items():
        assert first.token_ids[name] + second.token_ids[name] == ids
        np.testing.assert_allclose(first.logprobs[name] + second.logprobs[name], whole.logprobs[name], atol=1e-5)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(engine: Any) -> None:
    requests = [a_request(f"r{i}", tokens(6 + i, seed=i), new=24, seed=100 + i) for i in range(MAX_SLOTS)]
    together = run(engine, requests).token_ids
    backwards = run(engine, requests[::-1]).token_ids
    alone = {r.request_id: run(engine, [r]).token_ids[r.request_id] for r in requests[:3]}
    assert backwards == together
    assert alone == {name: together[name] for name in alone}


def test_different_seeds_give_different_tokens_and_any_integer_is_a_seed(engine: Any) -> None:
    seeds = [0, 1, -1, 2**62 + 5, -(2**63) + 6]
    requests = [a_request(f"r{i}", new=24, seed=seed) for i, seed in enumerate(seeds)]
    first = run(engine, requests).token_ids
    assert len({tuple(ids) for ids in first.values()}) == len(requests)
    assert run(engine, requests).token_ids == first


# ---- logprobs


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.7),
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=1.5),
        SamplingSettings(temperature=0.9, top_p=0.8),
        SamplingSettings(temperature=1.2, top_k=5),
        SamplingSettings(temperature=1.2, top_p=0.7, top_k=12),
    ],
    ids=str,
)
def test_logprobs_are_of_the_distribution_sampled_from(engine: Any, old_model: Any, sampling: SamplingSettings) -> None:
    requests = [a_request(f"r{i}", tokens(4 + 9 * i, seed=i), new=20, seed=i, sampling=sampling) for i in range(4)]
    harvest = run(engine, requests)
    for r in requests:
        expected = reference_logprobs(old_model, r.token_ids, harvest.token_ids[r.request_id], sampling)
        np.testing.assert_allclose(harvest.logprobs[r.request_id], expected, atol=1e-4)


def test_greedy_takes_the_most_likely_token(engine: Any, old_model: Any) -> None:
    request = a_request(new=20, sampling=GREEDY)
    ids = run(engine, [request]).token_ids["r"]
    logits = full_logits(old_model, [*request.token_ids.tolist(), *ids])[len(request.token_ids) - 1 : -1]
    assert ids == logits.argmax(-1).tolist()


def test_score_is_at_temperature_one_over_every_token(engine: Any, old_model: Any) -> None:
    sequences = [tokens(n, seed=n) for n in (1, 2, 40, BLOCK + 30, MAX_MODEL_LEN - 1, 12, 13, 14, 15, 16)]
    run(engine, [a_request(prompt=sequences[3], new=1)])  # its first block is in the prefix cache now
    for _ in range(2):
        scores = engine.score(sequences)
        for sequence, score in zip(sequences, scores, strict=True):
            assert score.dtype == np.float32
            np.testing.assert_allclose(score, reference_scores(old_model, sequence), atol=1e-4)
    assert engine.num_in_flight == 0


def test_score_and_rollout_agree(engine: Any) -> None:
    request = a_request(prompt=tokens(20), new=30)
    harvest = run(engine, [request])
    whole = np.concatenate([request.token_ids, np.asarray(harvest.token_ids["r"], np.int32)])
    np.testing.assert_allclose(engine.score([whole])[0][-30:], harvest.logprobs["r"], atol=1e-4)


def test_a_request_that_lost_its_kv_is_computed_again_and_loses_no_token(engine: Any, old_model: Any) -> None:
    """Eight times 2.1 blocks; with too little KV (see the settings at the end) vLLM preempts and replays."""
    requests = [a_request(f"r{i}", tokens(120, seed=i), new=150, seed=i) for i in range(MAX_SLOTS)]
    harvest, work = Harvest(), EngineWork()
    engine.submit(requests)
    while engine.num_in_flight:
        step = engine.step()
        harvest.add(step.deltas)
        work.add_step(step.duration_s, step)
    for r in requests:
        expected = reference_logprobs(old_model, r.token_ids, harvest.token_ids[r.request_id], r.sampling)
        assert len(expected) == 150
        np.testing.assert_allclose(harvest.logprobs[r.request_id], expected, atol=1e-4)
    replayed = sum(work.prefill) - MAX_SLOTS * 120
    assert engine.kv_capacity.tokens == KV_SEQUENCES * 3 * BLOCK and engine.kv_capacity.block_tokens == BLOCK
    if KV_SEQUENCES < MAX_SLOTS:
        assert replayed >= 240 and work.num_preempted >= 2 and work.kv_usage_max == 1.0
    else:
        assert replayed == work.num_preempted == 0 and work.kv_usage_max == 1.0


# ---- refusals


def test_a_request_beyond_the_context_is_refused_and_one_that_just_fits_runs(engine: Any) -> None:
    prompt = tokens(MAX_MODEL_LEN - 5)
    with pytest.raises(RunError, match=f"request big: .*315 tokens and up to 6 more.*at most {MAX_MODEL_LEN}"):
        engine.submit([a_request("small", new=1), a_request("big", prompt, new=6)])
    assert engine.num_in_flight == 0, "a refused call must submit nothing"
    assert len(run(engine, [a_request("fits", prompt, new=5)]).token_ids["fits"]) == 5
    with pytest.raises(RunError, match="score:0"):
        engine.score([tokens(MAX_MODEL_LEN)])
    with pytest.raises(RunError, match="token ids"):
        engine.submit([a_request(prompt=np.asarray([3, VOCABULARY], np.int32))])
    with pytest.raises(RunError, match="token ids"):
        engine.submit([a_request(prompt=np.zeros(0, np.int32))])


def test_misuse_is_an_assertion(engine: Any, old_model: Any) -> None:
    engine.submit([a_request("twice")])
    with pytest.raises(AssertionError, match="already in flight"):
        engine.submit([a_request("twice")])
    with pytest.raises(AssertionError, match="max_slots"):
        engine.submit([a_request(f"r{i}") for i in range(MAX_SLOTS)])
    for call in (engine.sleep, lambda: engine.score([tokens(3)]), lambda: publish(engine, old_model)):
        with pytest.raises(AssertionError, match="in flight"):
            call()


def test_sleep_and_wake_go_round_a_publication(published: Any, new_model: Any) -> None:
    published.sleep()
    with pytest.raises(AssertionError, match="sleeps"):
        published.submit([a_request()])
    with pytest.raises(AssertionError, match="wake"):
        publish(published, new_model)
    published.wake(("weights",))
    publish(published, new_model)
    with pytest.raises(AssertionError, match="sleeps"):
        published.score([tokens(4)])
    published.wake()
    np.testing.assert_allclose(published.score([tokens(40)])[0], reference_scores(new_model, tokens(40)), atol=1e-4)


# ---- weights


def test_a_publication_changes_what_is_sampled_and_is_read_back_bit_for_bit(published: Any, new_model: Any) -> None:
    publish(published, new_model)
    for name, tensor in new_model.state_dict().items():  # the state dict lists a tied lm_head too
        assert published.read_weight(name).equal(tensor), name
    request = a_request(prompt=tokens(30), new=30)
    harvest = run(published, [request])
    expected = reference_logprobs(new_model, request.token_ids, harvest.token_ids["r"], SamplingSettings())
    np.testing.assert_allclose(harvest.logprobs["r"], expected, atol=1e-4)


def test_the_engine_names_each_weight_as_the_trainer_does(engine: Any, old_model: Any) -> None:
    assert sorted(engine.weight_names) == sorted(name for name, _ in named(old_model))


@pytest.mark.parametrize("through_vllm", [True, False])
@pytest.mark.parametrize("order", ["each alone", "backwards", "state dict"])
def test_buckets_may_split_fused_and_tied_weights_anywhere(
    published: Any, new_model: Any, old_model: Any, order: str, through_vllm: bool
) -> None:
    """The buffer of a bucket is overwritten by the next one, as under ZeRO-3."""
    import torch

    for model in (new_model, old_model):  # whatever came before, each weight has been seen to change
        publish(published, model)
    assert published._weights._proven
    if through_vllm:
        published._weights._proven.clear()
    weights = list(new_model.state_dict().items()) if order == "state dict" else named(new_model)
    if order == "backwards":
        weights = weights[::-1]  # lm_head or norm first, the embedding last; up before gate, v before k before q

    def buckets() -> Iterator[list[tuple[str, Any]]]:
        buffer = torch.empty(max(t.numel() for _, t in weights), dtype=torch.float64)  # and in another dtype
        for name, tensor in weights:
            view = buffer[: tensor.numel()].view_as(tensor)
            view.copy_(tensor)
            yield [(name, view)]
            buffer.fill_(math.nan)

    published.load_weights(buckets())
    for name, tensor in new_model.state_dict().items():
        assert published.read_weight(name).equal(tensor), name
    np.testing.assert_allclose(published.score([tokens(50)])[0], reference_scores(new_model, tokens(50)), atol=1e-4)


def test_only_what_vllms_loader_was_seen_to_write_is_written_without_it(
    published: Any, new_model: Any, old_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places are exchanged, so the loader is never seen to write them; the others are copied, correctly."""
    from rlpost.engine.vllm_weights import EngineWeights

    model, through_vllm = published._weights._model, list[str]()
    load = model.load_weights

    def watched(tensors: Iterator[tuple[str, Any]]) -> Any:
        given = list(tensors)
        through_vllm.extend(name for name, _ in given)
        return load(iter(given))

    monkeypatch.setattr(model, "load_weights", watched)
    weights = EngineWeights(model, tied=published._weights._tied)
    exchanged = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    places = weights._layout
    places[exchanged[0]], places[exchanged[1]] = places[exchanged[1]], places[exchanged[0]]
    seen, padding = [], model.model.embed_tokens.weight.detach()[places["model.embed_tokens.weight"].stop :]
    for source in (old_model, new_model, old_model, new_model):
        through_vllm.clear()
        padding.fill_(math.nan)  # as the memory may hold after it was given up in sleep
        weights.load(named(source))
        seen.append(sorted(through_vllm))
    everything = sorted(name for name, _ in named(new_model))
    changing = {name for name, p in named(new_model) if not p.equal(old_model.get_parameter(name))}
    assert seen[:2] == [everything, everything], "the engine had the first weights: that they stayed proves nothing"
    assert len(padding) and not padding.any(), "vLLM's loader writes zeros there"
    assert seen[2] == seen[3] == sorted({*everything} - changing | {*exchanged}) and changing >= {*exchanged}
    published.abort_all()
    np.testing.assert_allclose(published.score([tokens(50)])[0], reference_scores(new_model, tokens(50)), atol=1e-4)


def test_a_publication_empties_the_prefix_cache(published: Any, new_model: Any, old_model: Any) -> None:
    prompt = tokens(2 * BLOCK + 10, seed=4)

    def first_error(model: Any) -> tuple[int, float]:
        prefilled, delta = first_delta(published, a_request("r", prompt, new=1))
        expected = reference_logprobs(model, prompt, delta.token_ids.tolist(), SamplingSettings())
        return prefilled, abs(float(delta.logprobs[0]) - expected[0])

    assert first_error(old_model)[1] < 1e-4  # fills the cache with the old weights' KV
    publish(published, new_model)
    prefilled, error = first_error(new_model)
    assert (prefilled, error < 1e-4) == (len(prompt), True)


def test_a_stale_prefix_cache_would_be_seen(
    published: Any, new_model: Any, old_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for the test above: without the reset, the old KV gives other logprobs and a prefix hit."""
    publish(published, old_model)
    prompt = tokens(2 * BLOCK + 10, seed=4)
    run(published, [a_request("r", prompt, new=1)])
    with monkeypatch.context() as patch:
        patch.setattr(published._engine, "reset_prefix_cache", lambda: True)
        publish(published, new_model)
        prefilled, delta = first_delta(published, a_request("r", prompt, new=1))
    expected = reference_logprobs(new_model, prompt, delta.token_ids.tolist(), SamplingSettings())
    assert prefilled == 10
    assert abs(float(delta.logprobs[0]) - expected[0]) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(published._engine, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="prefix cache"):
            publish(published, new_model)


def test_half_a_publication_is_refused(published: Any, new_model: Any) -> None:
    weights = named(new_model)
    with pytest.raises(ModelError, match="1 missing, such as model.norm.weight"):
        published.load_weights([[(n, t) for n, t in weights if n != "model.norm.weight"]])
    with pytest.raises(ModelError, match="weight name"):
        published.load_weights([[*weights, ("model.norm.bias", weights[0][1])]])
    with pytest.raises(ModelError, match="shape of model.norm.weight"):
        published.load_weights([[(n, t[:-1] if n == "model.norm.weight" else t) for n, t in weights]])
    with pytest.raises(ModelError, match="weight name"):
        published.read_weight("model.layers.0.self_attn.qkv_proj.weight")


# ---- the process


def test_the_process_is_left_as_it_was(engine: Any, old_model: Any) -> None:
    """Sampling, scoring and loading draw nothing from the trainer's generators."""
    import torch

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run(engine, [a_request(new=5)])
    engine.score([tokens(8)])
    publish(engine, old_model)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert "LOCAL_WORLD_SIZE" not in os.environ
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1, "vLLM turns set_num_threads off; the trainer needs it"
    torch.set_num_threads(threads)


# ---- before an engine is built, and what must never be swallowed (no engine needed)


def test_what_vllm_reports_is_never_dropped() -> None:
    def output(reason: str | None, ids: list[int], logprobs: list[float], request_id: str = "r9") -> Any:
        flat = SimpleNamespace(logprobs=logprobs)
        completion = SimpleNamespace(finish_reason=reason, token_ids=ids, logprobs=flat)
        return SimpleNamespace(request_id=request_id, outputs=[completion])

    others = [output(None, [3], [-0.5], "r1"), output("stop", [4, 5], [-1.0, 0.0], "r2"), output(None, [], [], "r3")]
    deltas = vllm_engine.read_deltas(others)
    assert [(d.request_id, d.token_ids.tolist(), d.logprobs.tolist(), d.finish_reason) for d in deltas] == [
        ("r1", [3], [-0.5], ""), ("r2", [4, 5], [-1.0, 0.0], "stop"), ("r3", [], [], "")
    ]  # fmt: skip
    assert all(d.token_ids.dtype == np.int32 and d.logprobs.dtype == np.float32 for d in deltas)
    assert vllm_engine.read_deltas([]) == []
    with pytest.raises(RunError, match="request r9 ended by vLLM: got 'abort'"):
        vllm_engine.read_deltas([*others, output("abort", [3], [-0.5])])
    with pytest.raises(RunError, match="logprobs of request r9"):
        vllm_engine.read_deltas([output(None, [3, 4], [-0.5]), *others])
    with pytest.raises(RunError, match="logprobs of request r9: got .*nan"):
        vllm_engine.read_deltas([*others, output(None, [3], [math.nan]), *others])


@pytest.mark.parametrize("version", ["0.28.0", "0.30.1+cpu", "0.32.0rc1"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.metadata, "version", lambda package: version)
    device, other = ("cpu", "cuda") if version.endswith("+cpu") else ("cuda", "cpu")
    assert vllm_engine.require_supported_vllm(device) == version
    with pytest.raises(RunError, match=f"vllm {re.escape(version)}, which is built for {device}"):
        vllm_engine.require_supported_vllm(other)


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0", "1.0.0"])
def test_other_versions_are_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.metadata, "version", lambda package: version)
    with pytest.raises(RunError, match=f"got '{version}'; expected >=0.28,<0.33"):
        vllm_engine.require_supported_vllm("cuda")


def test_the_environment_is_checked_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    vllm_engine.require_environment()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    with pytest.raises(RunError, match="VLLM_CPU_KVCACHE_SPACE"):
        vllm_engine.require_environment()
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    with pytest.raises(RunError, match="VLLM_ENABLE_V1_MULTIPROCESSING: got None"):
        vllm_engine.require_environment()


def test_kv_memory_by_hand(tmp_path: Path) -> None:
    # 2 (k and v) x 4 layers x 2 heads x 32 x 4 bytes = 2048 a token; 300 tokens are 3 blocks of 128; 5 x 3 + 1 blocks
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    needed = kv_cache.kv_bytes_needed(shape, max_slots=5, max_model_len=300, dtype="float32")
    assert needed == 16 * 128 * 2048
    assert kv_cache.kv_bytes_needed(shape, max_slots=5, max_model_len=300, dtype="bfloat16") == needed // 2
    assert kv_cache.bounded_kv_bytes(needed, needed // 5, free=10 * needed) == needed
    assert kv_cache.bounded_kv_bytes(needed, needed // 5, free=needed) == needed // 2
    with pytest.raises(RunError, match="memory for the KV cache"):
        kv_cache.bounded_kv_bytes(needed, needed // 5, free=needed // 5)
    one = 4 * 128 * 2048  # 3 blocks and vLLM's own
    kv_cache.require_one_sequence(one, shape, max_model_len=300, dtype="float32")
    with pytest.raises(RunError, match=f"engine.kv_cache_bytes: got {one - 1}; expected >= {one}"):
        kv_cache.require_one_sequence(one - 1, shape, max_model_len=300, dtype="float32")
    with pytest.raises(ModelError, match="config.json"):
        vllm_engine.read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(ModelError, match="num_hidden_layers"):
        vllm_engine.read_shape(str(tmp_path))


def test_the_config_becomes_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda folder, **kwargs: seen.update(kwargs, folder=folder))
    cfg = Config()
    cfg.engine.max_slots, cfg.engine.kv_cache_bytes, cfg.seed = 3, 4096, 17
    vllm_engine.build_engine(resolve(cfg, device="cpu", threads=1), model_folder="m", max_model_len=99)
    assert (seen["folder"], seen["max_slots"], seen["kv_cache_bytes"], seen["seed"]) == ("m", 3, 4096, 17)
    assert (seen["dtype"], seen["max_model_len"], seen["device"]) == ("float32", 99, "cpu")
    vllm_engine.build_engine(resolve(cfg, device="cuda", threads=1), model_folder="m", max_model_len=99)
    assert seen["dtype"] == "bfloat16"


# ---- other models and too little KV, each in a process of its own


ELSEWHERE = [
    {"RLPOST_CONTRACT_MODEL": "qwen2_tied"},
    {"RLPOST_CONTRACT_MODEL": "qwen3_untied"},
    {"RLPOST_CONTRACT_MODEL": "llama_untied"},
    {"RLPOST_CONTRACT_KV_SEQUENCES": "3"},
]
IS_OUTER = MODEL == "qwen3_tied" and KV_SEQUENCES == MAX_SLOTS and not ASYNC


def run_elsewhere(file: str, setting: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=240", file]
    done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not IS_OUTER, reason="the outer run only")
@pytest.mark.parametrize("setting", ELSEWHERE, ids=lambda setting: "-".join(setting.values()))
def test_the_contract_holds_elsewhere_too(setting: dict[str, str]) -> None:
    run_elsewhere(__file__, setting)


@pytest.mark.skipif(not IS_OUTER, reason="the outer run only")
@pytest.mark.parametrize(
    "file", [__file__, str(Path(__file__).with_name("test_keep_kv.py"))], ids=["contract", "keep_kv"]
)
def test_it_holds_with_asynchronous_scheduling(file: str) -> None:
    """For keep_kv also where requests wait for room in the KV cache: vLLM would wait for ever."""
    run_elsewhere(file, {"RLPOST_CONTRACT_ASYNC": "1"})
