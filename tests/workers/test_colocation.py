"""The guards of a publication, on the real engine and trainer: what arrived wrong stops the run."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rlpost.engine import vllm as vllm_engine
from rlpost.engine.protocol import Request, SamplingSettings
from rlpost.errors import RunError
from rlpost.session import open_session
from rlpost.train import deepspeed_trainer
from rlpost.workers import local
from rlpost.workers.canary import sample_canary
from rlpost.workers.colocation import SharedDevice
from rlpost.workers.local import start_worker
from rlpost.workers.publication import same_bits

pytestmark = pytest.mark.own_process  # one vLLM engine


@pytest.fixture(scope="module")
def session():
    from rlpost.config.compose import load_config

    return open_session(load_config(["recipe=math/arithmetic", "device=cpu", "eval.max_prompts=2", "train.lr=1e-2"]))


@pytest.fixture(scope="module")
def worker(session):
    worker = start_worker(session.worker_settings(needs_reference=False))
    yield worker
    worker.close()


@pytest.fixture
def device(worker):
    return worker.device


def move_weights(trainer, amount):
    import torch

    with torch.no_grad():
        for parameter in trainer.lm.parameters():
            parameter.add_(amount * torch.sign(parameter))


def test_a_publication_arrives_bit_for_bit(device, worker):
    before = worker.engine.score([np.arange(10, dtype=np.int32)])[0]
    with device.training():
        move_weights(worker.trainer, 1e-2)
    publication = device.publish_weights(policy_version=1)
    after = worker.engine.score([np.arange(10, dtype=np.int32)])[0]
    assert 0 < publication.canary_mean < 1e-5 and publication.canary_mean < publication.canary_max < 1e-3
    assert publication.num_bytes > 3e6
    assert np.abs(after - before).max() > 1e-2, "the engine still computes with the old weights"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8, 1001])
def test_same_bits_of_any_size_and_place(dtype, size):
    import torch

    values = torch.arange(2 * size + 8, dtype=getattr(torch, dtype))
    values[::3] = math.nan
    for start in (0, 1, 2, 5):  # in memory that begins anywhere
        part, copy = values[start : start + size], values[start : start + size].clone()
        assert same_bits(part, copy) and same_bits(copy, part)
        bits = copy.view(torch.int32 if dtype == "float32" else torch.int16)
        for position in {0, size // 2, size - 1} if size else ():
            bits[position] ^= 1  # of a NaN, too
            assert not same_bits(part, copy)
            bits[position] ^= 1
    assert not same_bits(values, values.to(torch.float64)) and not same_bits(values, values[None])
    assert not same_bits(torch.zeros(size + 1), -torch.zeros(size + 1))


def test_a_publication_that_does_nothing_is_caught(device, worker, monkeypatch):
    """One step at lr 1e-6 moves logprobs less than bf16's noise: only the fingerprint can see that nothing arrived."""
    monkeypatch.setattr(worker.engine, "load_weights", lambda buckets: [None for _ in buckets])
    with device.training():
        move_weights(worker.trainer, 1e-6)
    with pytest.raises(RunError, match="weight publication: .*the same bits"):
        device.publish_weights(policy_version=2)


def test_one_stale_tensor_is_caught_and_named(device, worker, monkeypatch):
    load = worker.engine.load_weights

    def all_but_one(buckets):
        kept = worker.engine.read_weight("model.layers.2.self_attn.k_proj.weight").clone()
        load(buckets)
        worker.engine.read_weight("model.layers.2.self_attn.k_proj.weight").copy_(kept)

    monkeypatch.setattr(worker.engine, "load_weights", all_but_one)
    with device.training():
        move_weights(worker.trainer, 1e-6)
    with pytest.raises(RunError, match=r"weight publication: model\.layers\.2\.self_attn\.k_proj\.weight"):
        device.publish_weights(policy_version=3)


def test_an_engine_that_computes_something_else_is_caught_by_the_canary(device, worker, monkeypatch):
    score = worker.engine.score
    monkeypatch.setattr(worker.engine, "score", lambda sequences: [s + np.float32(3e-4) for s in score(sequences)])
    with pytest.raises(RunError, match="canary"):
        device.publish_weights(policy_version=4)


def test_a_nan_in_the_canary_is_caught(device, worker, monkeypatch):
    score = worker.engine.score
    monkeypatch.setattr(worker.engine, "score", lambda sequences: [s * np.float32("nan") for s in score(sequences)])
    with pytest.raises(RunError, match="canary"):
        device.publish_weights(policy_version=5)


class Recorder:
    """Records the moves of memory in the order they are asked for."""

    def __init__(self, moves, name, part):
        self._moves, self._name, self._part = moves, name, part

    def __getattr__(self, name):
        return getattr(self._part, name)

    def sleep(self):
        self._moves.append(f"{self._name} sleeps")
        self._part.sleep()

    def wake(self, *tags):
        self._moves.append(" ".join([f"{self._name} wakes", *(tag for given in tags for tag in given)]))
        self._part.wake(*tags)

    def load_weights(self, buckets):
        self._moves.append("weights are loaded")
        self._part.load_weights(buckets)


def recorded_device(worker, session, *, moves_memory):
    moves = []
    engine, trainer = Recorder(moves, "engine", worker.engine), Recorder(moves, "trainer", worker.trainer)
    prompts = session.worker_settings(needs_reference=False).canary_prompts
    canary = sample_canary(worker.engine, prompts, max_tokens=session.max_model_len - 1)
    return SharedDevice(engine, trainer, canary=canary, threshold=1e-4, moves_memory=moves_memory), moves


def test_memory_changes_hands_in_this_order(worker, session):
    device, moves = recorded_device(worker, session, moves_memory=True)
    for version in (7, 8):
        with device.training():
            pass
        device.publish_weights(policy_version=version)
    turn = ["engine sleeps", "trainer wakes", "engine wakes weights", "weights are loaded"]
    assert moves == [*turn, "trainer sleeps", "engine wakes"] * 2


def test_where_both_stay_awake_nothing_moves_and_new_weights_drop_the_prefix_cache(worker, session):
    """The engine's KV of a prompt belongs to the weights that computed it."""
    device, moves = recorded_device(worker, session, moves_memory=False)
    prompt = np.arange(130, dtype=np.int32) % 17  # one whole block, and two tokens
    device.publish_weights(policy_version=9)
    with device.generating():
        assert [sample(worker.engine, prompt)[0] for _ in range(2)] == [130, 2], "the block is found the second time"
    with device.training():
        move_weights(worker.trainer, 2e-2)
    publication = device.publish_weights(policy_version=10)
    with device.generating():
        num_prefill, tokens, logprobs = sample(worker.engine, prompt)
    assert moves == ["weights are loaded"] * 2 and publication.canary_max < 1e-4
    assert num_prefill == 130, "a block of the old weights was used again"
    whole = np.concatenate([prompt, tokens]).astype(np.int32)
    assert np.abs(worker.engine.score([whole])[0][-len(tokens) :] - logprobs).max() < 1e-4


def with_sleep(session, sleep):
    settings = session.worker_settings(needs_reference=False)
    return replace(settings, cfg=replace(settings.cfg, engine=replace(settings.cfg.engine, sleep=sleep)))


@pytest.mark.parametrize("sleep", ["always", "never"])
def test_a_worker_is_built_to_move_memory_or_not(worker, session, monkeypatch, sleep):
    monkeypatch.setattr(deepspeed_trainer, "build_trainer", lambda cfg, **settings: worker.trainer)
    monkeypatch.setattr(local, "_start_engine", lambda settings, rank: (worker.engine, []))
    built = start_worker(with_sleep(session, sleep))
    moves, engine = [], worker.engine
    monkeypatch.setattr(engine, "sleep", lambda: moves.append("sleep"))
    monkeypatch.setattr(engine, "wake", lambda tags=(): moves.append("wake"))
    built.device.publish_weights(policy_version=11)
    assert moves == (["sleep", "wake", "wake"] if sleep == "always" else [])


def test_on_a_gpu_the_trainers_states_stay_where_the_engine_stays_awake(session):
    for sleep, offload, params, expected in (
        ("always", True, False, True),
        ("never", True, False, False),
        ("always", False, False, False),
        ("always", True, True, False),
    ):
        cfg = with_sleep(session, sleep).cfg
        train = replace(cfg.train, sleep_offload=offload, offload_params=params)
        assert deepspeed_trainer._sleeps(replace(cfg, device="cuda", train=train)) is expected
        assert not deepspeed_trainer._sleeps(replace(cfg, train=train)), "on a CPU nothing moves"


@pytest.mark.parametrize(
    ("device", "sleep", "keep_kv", "expected"),
    [("cuda", "always", False, True), ("cuda", "never", False, False), ("cuda", "always", True, False)]
    + [("cpu", "always", False, False)],
)
def test_vllm_gets_its_sleep_mode_only_where_memory_is_dropped(session, monkeypatch, device, sleep, keep_kv, expected):
    """The memory pool behind the mode costs an engine that never sleeps something, too."""
    given = {}

    def stop(**arguments):
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr("vllm.LLM", stop)
    monkeypatch.setattr(vllm_engine, "require_supported_vllm", lambda device: None)
    monkeypatch.setattr(vllm_engine, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(vllm_engine, "free_share_of_gpu", lambda: 0.5)
    settings = with_sleep(session, sleep)
    cfg = replace(settings.cfg, device=device, rollout=replace(settings.cfg.rollout, keep_kv=keep_kv))
    with pytest.raises(InterruptedError):
        vllm_engine.build_engine(cfg, model_folder=settings.model_folder, max_model_len=64)
    assert given["enable_sleep_mode"] is expected


def sample(engine, prompt):
    """Eight tokens after the prompt: (prompt tokens computed, tokens, their logprobs)."""
    engine.submit([Request("p", [prompt], 8, 1, SamplingSettings())])
    computed, tokens, logprobs = 0, [], []
    while engine.num_in_flight:
        step = engine.step()
        computed += step.num_prefill_tokens
        for delta in step.deltas:
            tokens += delta.token_ids.tolist()
            logprobs += delta.logprobs.tolist()
    return computed, np.array(tokens), np.array(logprobs)


def test_generation_needs_the_engines_turn(device):
    device.publish_weights(policy_version=6)
    with device.training(), pytest.raises(AssertionError, match="publish_weights"), device.generating():
        pass
