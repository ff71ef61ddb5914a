"""A rebuild changed no behavior: the same bits as before it. See ``identical.py``, which records and compares."""

from __future__ import annotations

import pytest

from . import identical


@pytest.fixture(scope="module")
def expected():
    digests = identical.recorded()["digests"]
    here = identical.processor()
    if here not in digests:
        pytest.skip(f"no digests were recorded on a processor like this one ({here}); there are {sorted(digests)}")
    return digests[here]


@pytest.mark.parametrize("name", identical.SCENARIOS)
def test_a_run_is_bit_for_bit_what_it_was_before(name, expected, tmp_path):
    assert identical.digest(identical.run_scenario(name, tmp_path)) == expected[name]
