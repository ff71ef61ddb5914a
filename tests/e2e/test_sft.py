"""`rlpost sft` from nothing, and the model it leaves evaluated: a few steps of the real thing."""

import json

import pytest

from .program import rlpost


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    output = rlpost("sft", "recipe=math/arithmetic", "sft.steps=6", "sft.tokens_per_step=1024", cwd=folder)
    return folder, output


def test_the_loss_falls_and_the_folder_is_whole(made):
    folder, output = made
    model = folder / "runs/arithmetic-sft/model"
    assert "step 6/6" in output and f"model.path={model.relative_to(folder)}" in output
    assert {p.name for p in model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 16
    assert float(output.split("nll ")[-1].split()[0]) < 2.9, "log(18) = 2.89 is where it starts"


def test_the_model_can_be_evaluated(made):
    folder, _ = made
    output = rlpost(
        "eval", "recipe=math/arithmetic", "model.path=runs/arithmetic-sft/model", "eval.max_prompts=5", cwd=folder
    )
    assert "5, 4 responses each, 20 in all" in output and "pass@4" in output and "95 % interval" in output
