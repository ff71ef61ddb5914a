"""Which workers make up an engine and where they are placed, for worlds of any size; no device is needed."""

from __future__ import annotations

import numpy as np
import pytest

from rlpost.workers.engine_map import EngineMap, place

WORLDS = [(workers, tp) for workers in range(1, 17) for tp in (1, 2, 4, 8) if workers % tp == 0]


@pytest.mark.parametrize(("workers", "tp"), WORLDS)
def test_every_worker_belongs_to_one_engine_as_vllm_divides_a_world(workers: int, tp: int) -> None:
    engines = EngineMap(num_workers=workers, tensor_parallel=tp)
    # vLLM 0.32, distributed/parallel_state.py: ranks reshaped to rows of tensor_parallel_size.
    assert engines.groups == np.arange(workers).reshape(-1, tp).tolist()
    assert engines.num_engines == len(engines.groups) == workers // tp
    for number, ranks in enumerate(engines.groups):
        assert engines.members(number) == ranks
        assert engines.leader(number) == min(ranks)
        assert {engines.engine_of(rank) for rank in ranks} == {number}


def test_a_world_that_engines_do_not_divide_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        EngineMap(num_workers=3, tensor_parallel=2)


GPU_WORKER = {"CPU": 4.0, "GPU": 1.0}


def machine(gpus: int, cpus: int = 64) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": 1e12}


def test_members_of_an_engine_share_a_machine_where_there_is_room() -> None:
    placement = place(EngineMap(num_workers=8, tensor_parallel=4), GPU_WORKER, [machine(4), machine(8)])
    assert placement.bundles == [{"CPU": 16, "GPU": 4}] * 2
    assert [placement.bundle_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "machines",
    [
        [machine(2)] * 4,  # no machine holds an engine
        [machine(4), machine(2), machine(2)],  # one holds one, the other engine must be spread
        [machine(8, cpus=15), machine(8, cpus=17)],  # enough GPUs, too few CPUs for two
    ],
)
def test_engines_are_spread_where_they_must_be(machines: list[dict[str, float]]) -> None:
    placement = place(EngineMap(num_workers=8, tensor_parallel=4), GPU_WORKER, machines)
    assert placement.bundles == [GPU_WORKER] * 8
    assert [placement.bundle_of(rank) for rank in range(8)] == list(range(8))


@pytest.mark.parametrize(("workers", "tp"), WORLDS)
def test_bundles_hold_what_their_workers_take(workers: int, tp: int) -> None:
    for machines in ([machine(16)], [machine(1)] * workers):
        placement = place(EngineMap(num_workers=workers, tensor_parallel=tp), GPU_WORKER, machines)
        in_bundle = [placement.bundle_of(rank) for rank in range(workers)]
        for number, bundle in enumerate(placement.bundles):
            assert bundle == {name: amount * in_bundle.count(number) for name, amount in GPU_WORKER.items()}


def test_a_worker_without_a_gpu_needs_none() -> None:
    placement = place(EngineMap(num_workers=2, tensor_parallel=2), {"CPU": 1}, [{"CPU": 2, "memory": 1e9}])
    assert placement.bundles == [{"CPU": 2}]
