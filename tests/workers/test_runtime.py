"""What ``auto`` becomes on a machine, and what the libraries find in the environment."""

import os
import warnings

import pytest

from rlpost.config import Config, ModelConfig
from rlpost.config.resolve import resolve
from rlpost.errors import ConfigError
from rlpost.workers import runtime as runtime_module
from rlpost.workers.runtime import (
    choose_device,
    choose_threads,
    count_gpus,
    require_gpus,
    require_usable,
    write_environment,
)

REAL_HAS_GPU = runtime_module.has_gpu
LARGE, SMALL = 10**9, 10**6
ON_CPU = {"device": "cpu", "dtype": "float32", "threads": 3}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))


def resolved(cfg, *, num_params):
    device = choose_device(cfg)
    cfg = resolve(cfg, device=device, threads=choose_threads(cfg, device, num_params=num_params))
    return cfg.device, cfg.model.dtype, cfg.threads


def test_without_a_gpu_everything_is_for_the_cpu(monkeypatch):
    assert resolved(Config(), num_params=LARGE) == ("cpu", "float32", 6)
    assert resolved(Config(), num_params=SMALL)[2] == 1, "a small model gains nothing from a second thread"


def test_with_a_gpu_everything_is_for_it_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: True)
    assert resolved(Config(), num_params=LARGE) == ("cuda", "bfloat16", 1)
    offloading = Config()
    offloading.train.offload_optimizer = True
    assert resolved(offloading, num_params=LARGE)[2] == 6, "AdamW runs on the CPU"
    assert resolved(Config(device="cpu"), num_params=LARGE)[1] == "float32"


@pytest.mark.parametrize(("visible", "seen"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_a_gpu_that_is_hidden_is_none(monkeypatch, visible, seen):
    monkeypatch.setattr(runtime_module, "has_gpu", REAL_HAS_GPU)
    monkeypatch.setattr(runtime_module, "_has_driver", lambda: True)
    monkeypatch.setattr(runtime_module.Path, "is_dir", lambda path: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device(Config()) == ("cuda" if seen else "cpu")
    if not seen:
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES hides all"):
            choose_device(Config(device="cuda"))


def test_what_was_asked_for_is_kept():
    cfg = Config(threads=2, model=ModelConfig(dtype="bfloat16"))
    assert resolved(cfg, num_params=SMALL) == ("cpu", "bfloat16", 2)
    with pytest.raises(ConfigError, match="device: got 'cuda'.*use device=cpu"):
        choose_device(Config(device="cuda"))


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
    write_environment(**ON_CPU, vocab_size=100)
    assert environment["OMP_NUM_THREADS"] == "3" and environment["DS_ACCELERATOR"] == "cpu"
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment, "it would override engine.kv_cache_bytes"


def test_large_vocabularies_are_worth_compiling_and_a_gpu_stays_visible(environment):
    for name in ("TORCHDYNAMO_DISABLE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    write_environment(device="cuda", dtype="bfloat16", threads=3, vocab_size=100)
    assert not {"TORCHDYNAMO_DISABLE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"} & environment.keys()
    write_environment(**ON_CPU, vocab_size=150_000)
    assert "TORCHDYNAMO_DISABLE" not in environment


def test_float32_on_a_gpu_is_float32(environment):
    environment.pop("TRITON_F32_DEFAULT", None)
    write_environment(**ON_CPU, vocab_size=100)
    write_environment(device="cuda", dtype="bfloat16", threads=3, vocab_size=100)
    assert "TRITON_F32_DEFAULT" not in environment
    write_environment(device="cuda", dtype="float32", threads=3, vocab_size=100)
    assert environment["TRITON_F32_DEFAULT"] == "ieee"


def test_a_gpu_that_torch_cannot_use_is_one_line(monkeypatch):
    import torch

    require_usable("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="for torch: this torch is built for CPUs.*make install DEVICE=gpu"):
        require_usable("cuda")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"driver on your system is too old \(found version 12080\)"):
        require_usable("cuda")


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("0, 2,3", 3), ("1,-1,2", 1)])
def test_gpus_are_counted_before_ray_hands_them_out(environment, visible, number):
    environment["CUDA_VISIBLE_DEVICES"] = visible
    assert count_gpus() == number
    require_gpus(number)
    with pytest.raises(ConfigError, match=f"got '{number + 1} workers with a GPU each'; expected at most {number},"):
        require_gpus(number + 1)
