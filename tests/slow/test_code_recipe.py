"""What code/humaneval_style promises: RL on verdicts of the sandbox lifts the share of right programs by 20 points, and
its warm-started model is the one its command makes."""

import re
import subprocess

import pytest

from tests.e2e.program import command, rlpost

pytestmark = [pytest.mark.slow, pytest.mark.own_process]
RECIPE = "recipe=code/humaneval_style"


@pytest.mark.timeout(1800)
def test_the_recipe_lifts_accuracy(tmp_path):
    train = command("train", RECIPE, "logging.wandb=disabled")
    output = subprocess.run(train, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    found = re.search(r"difference +\+[\d.]+ points \(\+([\d.]+) to", output)
    assert found and float(found.group(1)) >= 20, output


@pytest.mark.timeout(3600)
def test_the_shipped_model_can_be_made_again(tmp_path):
    made = tmp_path / "model"
    subprocess.run(command("sft", RECIPE, f"sft.output={made}"), cwd=tmp_path, check=True)
    accuracies = []
    for override in ([], [f"model.path={made}"]):
        found = re.search(r"mean@4\s+([\d.]+) %", rlpost("eval", RECIPE, *override, cwd=tmp_path))
        assert found
        accuracies.append(float(found.group(1)))
    assert abs(accuracies[0] - accuracies[1]) <= 5.0
