"""Optimizer and gradient reduction are the configuration's choice, at every ZeRO stage."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.config import TrainConfig
from rlpost.errors import ConfigError
from rlpost.train.optimization import Ranks, adamw
from rlpost.train.table import check_train
from tests.train import cases, machines

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


@STAGES
def test_an_optimizer_of_ones_own_makes_the_update(build, folders, stage):
    own = {"_target_": "tests.train.machines.sgd", "momentum": 0.0}
    trainer = build(stage, optimizer=own, grad_clip=0.0, lr=0.1)
    before = cases.weights_of(trainer)
    result = trainer.update(cases.packed_batch(1), cases.objective)
    moved = {name: weight - before[name] for name, weight in cases.weights_of(trainer).items()}
    length = math.sqrt(sum(float((m.double() ** 2).sum()) for m in moved.values()))
    assert result.applied and length == pytest.approx(0.1 * result.grad_norm, rel=1e-3), "SGD moves by lr x gradient"


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")]
)
def test_a_reduction_of_ones_own_has_the_last_word_on_the_gradients(build, folders, stage, dtype):
    plain = build(stage, dtype=dtype).update(cases.packed_batch(1), cases.objective)
    machines.Recorded.given.clear()
    own = {"_target_": "tests.train.machines.recorded", "scale": 3.0}
    trainer = build(stage, dtype=dtype, gradient_reduction=own)
    result = trainer.update(cases.packed_batch(1), cases.objective)
    assert result.grad_norm == pytest.approx(3 * plain.grad_norm, rel=1e-4) and result.loss == plain.loss
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders[True]).parameters())
    assert [sum(given.values()) >= parameters for given in machines.Recorded.given] == [True]
    assert build(stage, dtype=dtype).update(cases.packed_batch(1), cases.objective).grad_norm == plain.grad_norm


@pytest.mark.parametrize("key", ["optimizer", "gradient_reduction"])
def test_names_that_do_not_exist_are_refused_without_importing_a_part(key):
    check_train(TrainConfig())
    with pytest.raises(ConfigError, match=f"train.{key}.*nosuch"):
        check_train(TrainConfig(**{key: "nosuch"}))


@pytest.mark.parametrize("error", [RuntimeError("nvcc fatal:\n  unsupported"), ImportError("no module fused_adam")])
def test_an_optimizer_that_cannot_be_compiled_is_replaced_and_named_once(monkeypatch, capsys, error):
    """On a GPU, stage 3 prefers DeepSpeed's FusedAdam, which nvcc compiles on first use."""
    import deepspeed.ops.adam

    class Broken:
        def __init__(self, *arguments, **options):
            raise error

    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", Broken)
    for rank in (0, 1):
        optimizer = adamw(
            torch.nn.Linear(2, 2),
            train=TrainConfig(zero_stage=3, lr=0.25),
            device="cuda",
            ranks=Ranks(rank, ("here", "here")),
        )
        assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 0.25
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlpost: DeepSpeed's FusedAdam cannot be built") and str(error).split("\n")[0] in line


def test_deepspeeds_optimizer_is_asked_for_at_stage_3_on_a_gpu_only(monkeypatch):
    import deepspeed.ops.adam

    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", lambda parameters, **settings: settings)
    for device, stage, offload, asked in (
        ("cuda", 3, False, True),
        ("cuda", 3, True, False),
        ("cuda", 2, False, False),
        ("cpu", 3, False, False),
    ):
        train = TrainConfig(zero_stage=stage, offload_optimizer=offload)
        made = adamw(torch.nn.Linear(2, 2), train=train, device=device, ranks=Ranks(0, ("here",)))
        assert isinstance(made, dict) is asked


def test_ranks_know_who_shares_their_machine():
    assert Ranks(2, ("a", "b", "a", "b", "a")).neighbors == (0, 2, 4)
    assert Ranks(1, ("a", "b")).neighbors == (1,)
