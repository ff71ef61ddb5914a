"""Weights are published to an engine that shares neither device nor process with the trainer, and proved by digest."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
import torch

from rlpost.errors import RunError
from rlpost.workers.canary import CanaryResult, CanarySequence
from rlpost.workers.publication import Publisher, digest, holds_same_digest, same_bits

CANARY = [CanarySequence(np.arange(4, dtype=np.int32), 1), CanarySequence(np.arange(7, dtype=np.int32), 3)]


def logprobs_of(weights: dict[str, torch.Tensor], sequences: list[np.ndarray]) -> list[np.ndarray]:
    """A model of one parameter: each token's logprob is minus the sum of all weights."""
    total = sum(float(w.double().sum()) for w in weights.values())
    return [np.full(len(s) - 1, -total, np.float32) for s in sequences]


def engine_process(pipe, fault: str) -> None:  # type: ignore[no-untyped-def]
    """An engine in bfloat16 in a process of its own: takes bytes, answers with digests and logprobs."""
    weights: dict[str, torch.Tensor] = {}
    while True:
        order, *rest = pipe.recv()
        if order == "load":
            name, raw, shape = rest
            tensor = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(shape)
            if fault == "stale" and name == "b" and name in weights:
                continue
            weights[name] = -tensor if fault == "negated" and name == "a" else tensor
        elif order == "digest":
            pipe.send(digest(weights[rest[0]]))
        elif order == "score":
            pipe.send(
                logprobs_of(weights, rest[0]) if fault != "deaf" else [s[1:] * np.float32("nan") for s in rest[0]]
            )
        else:
            return


class RemoteEngine:
    dtype = torch.bfloat16

    def __init__(self, pipe) -> None:  # type: ignore[no-untyped-def]
        self.pipe = pipe

    def load_weights(self, buckets) -> None:  # type: ignore[no-untyped-def]
        for bucket in buckets:
            for name, tensor in bucket:
                raw = tensor.to(self.dtype).view(torch.uint8).numpy().tobytes()
                self.pipe.send(("load", name, raw, tuple(tensor.shape)))

    def digest(self, name: str) -> str:
        self.pipe.send(("digest", name))
        return self.pipe.recv()

    def score(self, sequences):  # type: ignore[no-untyped-def]
        self.pipe.send(("score", list(sequences)))
        return self.pipe.recv()


class Trainer:
    def __init__(self) -> None:
        self.weights = {"a": torch.tensor([[0.5, -0.25]]), "b": torch.tensor([1.0, 2.0, 3.0])}

    def iter_weights(self, max_bytes: int):  # type: ignore[no-untyped-def]
        for name, tensor in self.weights.items():
            yield [(name, tensor)]

    def score(self, sequences):  # type: ignore[no-untyped-def]
        return logprobs_of(self.weights, sequences)


@pytest.fixture
def publisher_of():
    ended = []

    def make(fault=""):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=engine_process, args=(theirs, fault), daemon=True)
        process.start()
        ended.append((ours, process))
        trainer, engine = Trainer(), RemoteEngine(ours)
        holds = holds_same_digest(engine.digest, engine.dtype)
        return trainer, Publisher(trainer, engine, holds=holds, canary=CANARY, threshold=1e-3)

    yield make
    for pipe, process in ended:
        pipe.send(("end",))
        process.join(10)


def publish(publisher: Publisher) -> tuple[int, CanaryResult]:
    expected = publisher.expected_canary()
    num_bytes = publisher.copy()
    publisher.check_fingerprint()
    return num_bytes, publisher.check_canary(expected)


def test_a_publication_reaches_another_process_and_is_proved_there(publisher_of):
    trainer, publisher = publisher_of()
    assert publish(publisher) == (5 * 4, CanaryResult(0.0, 0.0, 0))
    trainer.weights["b"] = trainer.weights["b"] + 1.0
    assert publish(publisher) == (5 * 4, CanaryResult(0.0, 0.0, 0))


def test_what_did_not_arrive_there_is_named(publisher_of):
    trainer, publisher = publisher_of("stale")
    publish(publisher)
    trainer.weights["b"] = trainer.weights["b"] + 1.0
    with pytest.raises(RunError, match="weight publication: b.*the same bits"):
        publish(publisher)


def test_another_model_there_is_caught_by_either_guard(publisher_of):
    _, publisher = publisher_of("negated")
    expected = publisher.expected_canary()
    publisher.copy()
    with pytest.raises(RunError, match="weight publication: a"):
        publisher.check_fingerprint()
    with pytest.raises(RunError, match=r"canary.*0\.5 nats \(largest 0\.5; worst in sequence 0\)"):
        publisher.check_canary(expected)


def test_a_canary_that_is_not_a_number_is_caught(publisher_of):
    _, publisher = publisher_of("deaf")
    with pytest.raises(RunError, match="canary.*nan nats"):
        publish(publisher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digests_are_equal_exactly_where_the_bits_are(dtype):
    values = torch.tensor([[0.0, 1.0, math.nan], [2.0, -3.0, math.inf]], dtype=dtype)
    others = [values.clone(), -values, values.reshape(3, 2), values.to(torch.float64), values.flip(0), values[:, :2]]
    for other in others:
        assert (digest(values) == digest(other)) == same_bits(values, other)
    assert digest(values) == digest(values.T.contiguous().T), "the same bits in another order in memory"
    assert digest(torch.zeros(1)) != digest(-torch.zeros(1))
