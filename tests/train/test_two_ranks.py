"""Two ranks with unequal numbers of rows train as one plain PyTorch loop does, at every ZeRO stage (gloo, no ports)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.train.saved_weights import write_model
from tests.train import cases

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both ranks' results, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("ranks")
    cases.save_model(folder / "model", tied=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests" / "train" / "rank_program.py")]
    processes = [
        subprocess.Popen([*program, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)], folder


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nan_on_one_rank_is_skipped_by_both_and_resuming_is_identical(ranks, stage):
    for rank in ranks[0]:
        assert rank[stage]["nan_skipped"] and rank[stage]["resumed_identical"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_rank_gets_its_own_logprobs(ranks, stage):
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
        np.testing.assert_allclose(np.concatenate(first[stage][key]), np.concatenate(masked[:8]), atol=3e-5)
        np.testing.assert_allclose(np.concatenate(second[stage][key]), np.concatenate(masked[8:]), atol=3e-5)
    assert [len(rank[stage]["scores"]) for rank in (first, second)] == [4, 1]
