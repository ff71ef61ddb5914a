"""In float32 the canary alone finds a stale layer, another layer's weights, and scales that are 1 % off."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.canary import change_weights, open_worker
from rlpost.errors import RunError
from tests.workers.canary_faults import publish_with, weights_of

pytestmark = pytest.mark.own_process  # one vLLM engine


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with open_worker("demo", "float32", tmp_path_factory.mktemp("model")) as worker:
        yield worker


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fault", ["layer", "other layer", "attention", "head", "norm"])
def test_a_fault_that_the_fingerprint_does_not_see_stops_the_run(worker, fault, seed):
    rng, first = np.random.default_rng(seed), weights_of(worker)
    change_weights(worker, rng, 0.003)
    with pytest.raises(RunError, match="canary: mean logprob difference.*worst in sequence"):
        publish_with(worker, fault, first)
    healthy = worker.device.publish_weights(2)
    assert 0 < healthy.canary_mean < 1e-5, "the next publication heals it"
