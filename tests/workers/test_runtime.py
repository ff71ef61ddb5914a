"""What ``auto`` becomes on a machine, and what the libraries find in the environment."""

import os
import warnings
from dataclasses import replace

import pytest

from rlpost.config import Config, ModelConfig
from rlpost.errors import ConfigError
from rlpost.workers import runtime as runtime_module
from rlpost.workers.runtime import Runtime, choose_runtime, write_environment

LARGE, SMALL = 10**9, 10**6
ON_CPU = Runtime(device="cpu", dtype="float32", threads=3)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))


def test_without_a_gpu_everything_is_for_the_cpu(monkeypatch):
    assert choose_runtime(Config(), num_params=LARGE) == Runtime(device="cpu", dtype="float32", threads=6)
    assert choose_runtime(Config(), num_params=SMALL).threads == 1, "a small model gains nothing from a second thread"


def test_with_a_gpu_everything_is_for_it_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: True)
    assert choose_runtime(Config(), num_params=SMALL) == Runtime(device="cuda", dtype="bfloat16", threads=6)
    assert choose_runtime(Config(device="cpu"), num_params=LARGE).dtype == "float32"


def test_what_was_asked_for_is_kept():
    cfg = Config(threads=2, model=ModelConfig(dtype="bfloat16"))
    assert choose_runtime(cfg, num_params=SMALL) == Runtime(device="cpu", dtype="bfloat16", threads=2)
    with pytest.raises(ConfigError, match="device: got 'cuda'.*use device=cpu"):
        choose_runtime(Config(device="cuda"), num_params=SMALL)


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment and of the warning filters, put back afterwards."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_the_environment_of_a_cpu_run(environment):
    environment["VLLM_CPU_KVCACHE_SPACE"] = "4"
    environment.pop("TORCHDYNAMO_DISABLE", None)
    write_environment(ON_CPU, vocab_size=100)
    assert environment["OMP_NUM_THREADS"] == "3" and environment["DS_ACCELERATOR"] == "cpu"
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment, "it would override engine.kv_cache_bytes"


def test_large_vocabularies_are_worth_compiling_and_a_gpu_stays_visible(environment):
    for name in ("TORCHDYNAMO_DISABLE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    write_environment(replace(ON_CPU, device="cuda"), vocab_size=100)
    assert not {"TORCHDYNAMO_DISABLE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"} & environment.keys()
    write_environment(ON_CPU, vocab_size=150_000)
    assert "TORCHDYNAMO_DISABLE" not in environment
