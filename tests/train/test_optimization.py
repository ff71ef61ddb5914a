"""Optimizer and gradient reduction are the configuration's choice, at every ZeRO stage."""

from __future__ import annotations

import math

import pytest
from transformers import AutoModelForCausalLM

from rlpost.config import TrainConfig
from rlpost.errors import ConfigError
from rlpost.train.optimization import Ranks
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


@STAGES
def test_a_reduction_of_ones_own_has_the_last_word_on_the_gradients(build, folders, stage):
    plain = build(stage).update(cases.packed_batch(1), cases.objective)
    machines.Recorded.given.clear()
    own = {"_target_": "tests.train.machines.recorded", "scale": 3.0}
    trainer = build(stage, gradient_reduction=own)
    result = trainer.update(cases.packed_batch(1), cases.objective)
    assert result.grad_norm == pytest.approx(3 * plain.grad_norm, rel=1e-4) and result.loss == plain.loss
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders[True]).parameters())
    assert [sum(given.values()) >= parameters for given in machines.Recorded.given] == [True]
    assert build(stage).update(cases.packed_batch(1), cases.objective).grad_norm == plain.grad_norm


@pytest.mark.parametrize("key", ["optimizer", "gradient_reduction"])
def test_names_that_do_not_exist_are_refused_without_importing_a_part(key):
    check_train(TrainConfig())
    with pytest.raises(ConfigError, match=f"train.{key}.*nosuch"):
        check_train(TrainConfig(**{key: "nosuch"}))


def test_ranks_know_who_shares_their_machine():
    assert Ranks(2, ("a", "b", "a", "b", "a")).neighbors == (0, 2, 4)
    assert Ranks(1, ("a", "b")).neighbors == (1,)
