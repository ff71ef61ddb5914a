"""The model that ships is the one its command makes: `rlpost sft` from nothing lands within 5 points of it."""

import re

import pytest

from tests.e2e.program import command

pytestmark = [pytest.mark.slow, pytest.mark.own_process]


@pytest.mark.timeout(3600)
def test_the_shipped_model_can_be_made_again(tmp_path):
    import subprocess

    made = tmp_path / "model"
    subprocess.run(command("sft", "recipe=math/arithmetic", f"sft.output={made}"), cwd=tmp_path, check=True)
    assert abs(accuracy_of(f"model.path={made}", tmp_path) - accuracy_of(None, tmp_path)) <= 5.0


def accuracy_of(override, cwd):
    from tests.e2e.program import rlpost

    output = rlpost("eval", "recipe=math/arithmetic", *([override] if override else []), cwd=cwd)
    found = re.search(r"mean@4\s+([\d.]+) %", output)
    assert found, output
    return float(found.group(1))
