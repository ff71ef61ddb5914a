"""The models that ship are the ones their commands make: `rlpost sft` lands within 5 points of them."""

import re

import pytest

from tests.e2e.program import command

pytestmark = [pytest.mark.slow, pytest.mark.own_process]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", ["recipe=math/arithmetic", "recipe=math/arithmetic_long"])
def test_the_shipped_model_can_be_made_again(recipe, tmp_path):
    import subprocess

    made = tmp_path / "model"
    subprocess.run(command("sft", recipe, f"sft.output={made}"), cwd=tmp_path, check=True)
    assert abs(accuracy_of([recipe, f"model.path={made}"], tmp_path) - accuracy_of([recipe], tmp_path)) <= 5.0


def accuracy_of(overrides, cwd):
    from tests.e2e.program import rlpost

    output = rlpost("eval", *overrides, "eval.samples_per_prompt=4", cwd=cwd)
    found = re.search(r"mean@4\s+([\d.]+) %", output)
    assert found, output
    return float(found.group(1))
