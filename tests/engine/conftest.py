"""One real engine per test process, on a tiny random model, and the same model in transformers to compare with.

The contract in ``test_engine_contract.py`` holds for any engine: ``ENGINES`` lists how to build each. Which model the
engine is built on, and how much KV it gets, can be set from outside, because a process holds one vLLM engine only:
``RLPOST_CONTRACT_MODEL`` (a key of ``MODELS``), ``RLPOST_CONTRACT_KV_SEQUENCES`` (full-length sequences that fit),
``RLPOST_CONTRACT_ASYNC`` (1: with asynchronous scheduling, vLLM's default on a GPU).
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import async_scheduling
from tests.random_models import random_model

MAX_SLOTS = 8
MAX_MODEL_LEN = 320

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_untied": {"model_type": "qwen3", "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
}
MODEL = os.environ.get("RLPOST_CONTRACT_MODEL", "qwen3_tied")
ASYNC = os.environ.get("RLPOST_CONTRACT_ASYNC") == "1"
KV_SEQUENCES = int(os.environ.get("RLPOST_CONTRACT_KV_SEQUENCES", MAX_SLOTS))


def make_hf_model(seed: int) -> Any:
    return random_model(
        seed,
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        **MODELS[MODEL],
    )


def build_vllm_engine(folder: Path, *, kv_sequences: int = KV_SEQUENCES, keep_kv: bool = False) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from rlpost.engine.kv_budget import kv_bytes_needed
    from rlpost.engine.vllm import VLLMEngine, read_shape

    if ASYNC:
        async_scheduling.switch_on()
    shape = read_shape(str(folder))
    engine = VLLMEngine(
        str(folder),
        max_slots=MAX_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        device="cpu",
        seed=0,
        kv_cache_bytes=kv_bytes_needed(shape, max_slots=kv_sequences, max_model_len=MAX_MODEL_LEN, dtype="float32"),
        keep_kv=keep_kv,
    )
    assert bool(engine._core.batch_queue is not None) == ASYNC
    return engine


ENGINES = {"vllm": build_vllm_engine}


def process_state(torch: Any) -> tuple[Any, ...]:
    """What a trainer in the same process would notice: generators, threads, its idea of the world."""
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return *generators, torch.set_num_threads, torch.get_num_threads(), os.environ.get("LOCAL_WORLD_SIZE")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_hf_model(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(ENGINES))
def shared_engine(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    import torch

    before = process_state(torch)
    engine = ENGINES[request.param](model_folder)
    assert process_state(torch) == before, "building an engine changed the trainer's process"
    yield engine
    engine.shutdown()


@pytest.fixture
def engine(shared_engine: Any) -> Any:
    """The engine, idle before and after each test."""
    assert shared_engine.num_in_flight == 0
    yield shared_engine
    shared_engine.abort_all()


@pytest.fixture(scope="session")
def old_model() -> Any:
    return make_hf_model(seed=0)


@pytest.fixture(scope="session")
def new_model() -> Any:
    return make_hf_model(seed=1)
