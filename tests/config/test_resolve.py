"""Everything that depends on the device is written out once, and what the user has set stays."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest

from rlpost.config import Config
from rlpost.config.resolve import WRITTEN_OUT, resolve


@pytest.mark.parametrize(
    ("device", "dtype", "row_tokens", "canary", "eager", "slots"),
    [("cpu", "float32", 1024, 1e-4, True, 64), ("cuda", "bfloat16", 16384, 0.1, False, 256)],
)
def test_what_is_left_open_suits_the_device(device, dtype, row_tokens, canary, eager, slots):
    cfg = resolve(Config(), device=device, threads=3)
    assert (cfg.device, cfg.threads, cfg.cluster.cpus_per_worker) == (device, 3, 3)
    assert (cfg.model.dtype, cfg.train.max_row_tokens, cfg.canary_threshold) == (dtype, row_tokens, canary)
    assert (cfg.engine.enforce_eager, cfg.engine.max_slots, cfg.max_in_flight) == (eager, slots, slots)
    assert cfg.eval.max_response_tokens == cfg.rollout.max_response_tokens
    assert resolve(cfg, device=device, threads=3) == cfg


@pytest.mark.parametrize(
    ("device", "dtype", "stage", "sums"),
    [
        ("cpu", "float32", 1, "float32"),
        ("cpu", "bfloat16", 2, "float32"),
        ("cuda", "float32", 2, "float32"),
        ("cuda", "bfloat16", 2, "float32"),
    ],
)
def test_gradients_are_summed_in_float32(device, dtype, stage, sums):
    cfg = Config()
    cfg.model.dtype = dtype
    train = resolve(cfg, device=device, threads=1).train
    assert (train.zero_stage, train.grad_accum_dtype) == (stage, sums)
    cfg.train.zero_stage = 1
    assert resolve(cfg, device=device, threads=1).train.grad_accum_dtype == dtype, "as DeepSpeed does at stage 1"
    cfg.train.zero_stage, cfg.train.grad_accum_dtype = 3, "bfloat16"
    train = resolve(cfg, device=device, threads=1).train
    assert (train.zero_stage, train.grad_accum_dtype) == (3, "bfloat16")


def test_whether_an_engine_stays_awake_is_left_to_a_gpus_memory():
    for device, asked, expected in (("cpu", "auto", "always"), ("cuda", "auto", "auto"), ("cpu", "never", "never")):
        cfg = Config()
        cfg.engine.sleep = asked
        assert resolve(cfg, device=device, threads=1).engine.sleep == expected


def test_what_is_set_stays_and_decides_what_follows_from_it():
    cfg = Config(canary_threshold=0.01)
    cfg.model.dtype, cfg.engine.enforce_eager, cfg.eval.max_response_tokens = "float32", True, 7
    cfg.train.max_row_tokens, cfg.cluster.cpus_per_worker = 5, 9
    done = resolve(cfg, device="cuda", threads=2)
    assert (done.model.dtype, done.engine.enforce_eager, done.eval.max_response_tokens) == ("float32", True, 7)
    assert (done.train.max_row_tokens, done.cluster.cpus_per_worker, done.canary_threshold) == (5, 9, 0.01)
    again = resolve(replace(cfg, canary_threshold=None), device="cuda", threads=2)
    assert again.canary_threshold == 1e-4, "the threshold follows the dtype, not the device"


def test_an_engine_has_the_slots_that_the_samples_in_flight_need():
    cfg = Config()
    cfg.cluster.num_workers, cfg.rollout.max_in_flight = 3, 1000
    assert resolve(cfg, device="cpu", threads=1).engine.max_slots == 334
    assert resolve(cfg, device="cuda", threads=1).max_in_flight == 1000
    cfg.engine.max_slots = 5
    assert resolve(cfg, device="cuda", threads=1).engine.max_slots == 5


def test_every_key_that_is_written_out_is_named_and_no_other():
    before = dict(leaves(Config()))
    after = dict(leaves(resolve(Config(), device="cpu", threads=1)))
    assert {key for key in before if before[key] != after[key]} == set(WRITTEN_OUT)


def leaves(node, prefix=""):
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
