"""In bfloat16 the canary alone finds another layer's weights, and a healthy run goes on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.canary import change_weights, open_worker
from rlpost.errors import RunError
from tests.workers.canary_faults import publish_with

pytestmark = pytest.mark.own_process  # one vLLM engine


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with open_worker("demo", "bfloat16", tmp_path_factory.mktemp("model")) as worker:
        yield worker


def publish_and_change(worker, times, seed):
    rng = np.random.default_rng(seed)
    for _ in range(times):
        change_weights(worker, rng, 0.003)
        published = worker.device.publish_weights(1)
        assert 0 < published.canary_mean < 0.1 and published.canary_mean < published.canary_max


def test_another_layers_weights_stop_the_run(worker):
    with pytest.raises(RunError, match="canary: mean logprob difference.*worst in sequence"):
        publish_with(worker, "other layer", {})
    worker.device.publish_weights(2)


def test_a_healthy_run_of_a_hundred_publications_never_stops(worker):
    publish_and_change(worker, 100, seed=3)
