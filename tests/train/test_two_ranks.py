"""Two ranks (gloo, no ports) with rows divided between them train as one rank does, at every ZeRO stage."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.train.saved_weights import write_model
from rlpost.workers.cluster.trainer_group import split_rows
from tests.train import cases, parity
from tests.two_ranks import run_two_ranks

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(folder, program):
    """Both ranks' results."""
    cases.save_model(folder / "model", tied=True)
    return run_two_ranks("train/rank_program.py", folder, program)


# ---- two ranks and one, on the same groups ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("parity"), "parity")


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("machines"), "machines")


@pytest.fixture(params=[1, 2, 3])
def on_machines(request, build, two_machines):
    """The same with a gradient reduction that keeps ZeRO within a machine and exchanges between them."""
    trainer = build(request.param)
    one = parity.train(trainer, parity.config(request.param), parity.Spmd(trainer), world=1)
    return one, [rank[request.param] for rank in two_machines]


def test_a_reduction_over_machines_comes_to_the_same_update(on_machines):
    assert_the_same_training(*on_machines)


@pytest.fixture(params=[1, 2, 3])
def both(request, build, two_ranks):
    """(what one rank came to, what each of two did), at one ZeRO stage."""
    cfg = parity.config(request.param)
    trainer = build(request.param)
    one = parity.train(trainer, cfg, parity.Spmd(trainer), world=1)
    return one, [rank[request.param] for rank in two_ranks]


@pytest.fixture(scope="module")
def two_in_bfloat16(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("bfloat16"), "bfloat16")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_in_bfloat16_come_to_what_one_does_but_for_its_rounding(build, two_in_bfloat16, stage):
    """A gradient has 8 bits; logprobs of a bfloat16 model differ by a few hundredths anyway."""
    trainer = build(stage, dtype="bfloat16")
    one = parity.train(trainer, parity.config(stage), parity.Spmd(trainer), world=1)
    for rank in two_in_bfloat16:
        two = rank[stage]
        np.testing.assert_allclose(two["losses"], one["losses"], rtol=0, atol=0.02)
        np.testing.assert_allclose(two["grad_norms"], one["grad_norms"], rtol=0.03)
        np.testing.assert_array_equal(two["weights"], two_in_bfloat16[0][stage]["weights"])


def test_the_divisions_are_the_hard_ones():
    cfg = parity.config(1)
    parts = [split_rows(parity.batch_of(step, cfg).rows, 2, parity.HIDDEN_SIZE) for step in range(5)]
    assert [] in parts[2], "a rank without any row"
    assert len({len(part) for part in parts[0]}) == 2, "unequal numbers of rows"
    assert parts[4] != split_rows(parity.batch_of(4, cfg).rows, 2, 0), "attention decides"


def test_two_ranks_come_to_the_losses_gradients_and_parameters_of_one(both):
    assert_the_same_training(*both)


def assert_the_same_training(one, two):
    for rank in two:
        np.testing.assert_allclose(rank["losses"], one["losses"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(rank["grad_norms"], one["grad_norms"], rtol=1e-5)
        for ours, reference in zip(rank["gradients"], one["gradients"], strict=True):
            assert np.linalg.norm(ours - reference) < 1e-5 * np.linalg.norm(reference)
        np.testing.assert_allclose(rank["weights"], one["weights"], rtol=0, atol=5e-5)
        np.testing.assert_allclose(rank["logprobs"], one["logprobs"], atol=3e-5)


def test_metrics_are_those_of_the_whole_batch_whatever_the_number_of_ranks(both):
    one, (first, second) = both
    assert first["metrics"] == second["metrics"], "every rank knows the whole"
    for ours, reference in zip(first["metrics"], one["metrics"], strict=True):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6)


# ---- two ranks and plain PyTorch; files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both ranks' results, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(folder, "durable"), folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_equal_one_plain_loop(ranks, stage):
    (first, second), folder = ranks[0], ranks[1]
    plain = cases.PlainLoop(folder / "model")
    for step in range(3):
        loss, norm, _ = plain.update(cases.sequences(step, 10))
        for rank in (first, second):
            assert rank[stage]["losses"][step] == pytest.approx(loss, abs=1e-5)
            assert rank[stage]["grad_norms"][step] == pytest.approx(norm, rel=1e-5)
        assert first[stage]["metrics"][step] == second[stage]["metrics"][step]
        assert first[stage]["metrics"][step]["loss/rank/max"] == 1.0
    for rank in (first, second):
        assert cases.largest_difference(rank[stage]["weights"], dict(plain.model.named_parameters())) < 5e-5
    exported = AutoModelForCausalLM.from_pretrained(folder / f"export-{stage}")
    assert cases.largest_difference(dict(exported.named_parameters()), first[stage]["weights"]) == 0.0
    write_model(folder / f"checkpoint-{stage}", folder / f"config-{stage}", folder / f"made-{stage}")
    made = AutoModelForCausalLM.from_pretrained(folder / f"made-{stage}")
    assert cases.largest_difference(dict(made.named_parameters()), first[stage]["weights"]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nan_on_one_rank_is_skipped_by_both_and_resuming_is_identical(ranks, stage):
    for rank in ranks[0]:
        assert rank[stage]["nan_skipped"] and rank[stage]["resumed_identical"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_logprobs_of_all_ranks_come_back_in_the_order_of_the_rows(ranks, stage):
    (first, second), folder = ranks[0], ranks[1]
    plain = cases.PlainLoop(folder / "model")
    samples = cases.sequences(5, 10)
    for key, trained in (("reference", False), ("logprobs", True)):
        if trained:
            for step in range(3):
                plain.update(cases.sequences(step, 10))
        with torch.no_grad():
            expected = [cases.reference_logprobs(plain.model, s["token_ids"], 0.8)[0].numpy() for s in samples]
        masked = [np.concatenate([[0.0], e]) * s["loss_mask"] for e, s in zip(expected, samples, strict=True)]
        for rank in (first, second):
            np.testing.assert_allclose(np.concatenate(rank[stage][key]), np.concatenate(masked), atol=3e-5)
    assert [len(rank[stage]["scores"]) for rank in (first, second)] == [4, 1]
