"""A model made of a checkpoint's files alone is the model that was trained, bit for bit."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.errors import RunError
from rlpost.train.saved_weights import write_model
from tests.train import cases


def save(trainer, folder):
    trainer.save(folder / "trainer")
    trainer.save_config(folder / "model_files")
    return folder / "trainer", folder / "model_files"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_trainers_model(build, tmp_path, stage, tied, dtype):
    trainer = build(stage, tied=tied, dtype=dtype)
    for step in range(2):
        assert trainer.update(cases.packed_batch(step), cases.objective).applied
    write_model(*save(trainer, tmp_path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    weights = dict(model.named_parameters())
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in weights.values())
    assert cases.largest_difference(weights, cases.weights_of(trainer)) == 0.0
    sequence = cases.sequences(5, 1)[0]["token_ids"]
    expected = trainer.score([sequence])[0]
    with torch.no_grad():
        logprobs = cases.reference_logprobs(model.float(), sequence, 1.0)[0].numpy()
    np.testing.assert_allclose(logprobs, expected, atol=1e-5 if dtype == "float32" else 0.1)


def test_damaged_and_foreign_files_are_one_clear_line(build, tmp_path):
    trainer_folder, model_files = save(build(1, tied=False), tmp_path)
    with pytest.raises(RunError, match="trainer.json"):
        write_model(tmp_path / "nothing", model_files, tmp_path / "out")
    other = save(build(1), tmp_path / "other")[1]
    with pytest.raises(RunError, match="expected every weight of the model"):
        write_model(trainer_folder, other, tmp_path / "out")
    for file in trainer_folder.rglob("*optim_states.pt"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="expected whole files"):
        write_model(trainer_folder, model_files, tmp_path / "out")
