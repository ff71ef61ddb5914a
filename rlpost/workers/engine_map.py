"""Which workers make up which engine, and where they are placed. Pure functions: no Ray, no device.

A worker has one device and one trainer rank. An engine spans ``engine.tensor_parallel`` workers with consecutive ranks,
as vLLM divides a world into tensor-parallel groups; the lowest rank leads and is the one the controller talks to. No
engine needs a port of its own: all groups use the store of the trainer's ranks, on a free port of rank 0's machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlpost.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMap:
    """Maps the workers' ranks to engine numbers, and back. ``tensor_parallel`` divides ``num_workers``."""

    num_workers: int
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        assert self.num_workers % self.tensor_parallel == 0, "rlpost check refuses this"

    @staticmethod
    def of(cfg: Config) -> EngineMap:
        return EngineMap(num_workers=cfg.cluster.num_workers, tensor_parallel=cfg.engine.tensor_parallel)

    @property
    def num_engines(self) -> int:
        return self.num_workers // self.tensor_parallel

    def engine_of(self, rank: int) -> int:
        return rank // self.tensor_parallel

    def members(self, engine: int) -> list[int]:
        """Ranks, the leader first."""
        first = engine * self.tensor_parallel
        return list(range(first, first + self.tensor_parallel))

    def leader(self, engine: int) -> int:
        return engine * self.tensor_parallel

    @property
    def groups(self) -> list[list[int]]:
        """Every engine's members."""
        return [self.members(engine) for engine in range(self.num_engines)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Bundles of a placement group: each is placed on one machine as a whole."""

    bundles: list[dict[str, float]]
    workers_per_bundle: int

    def bundle_of(self, rank: int) -> int:
        return rank // self.workers_per_bundle


def place(workers: EngineMap, worker: Mapping[str, float], machines: Sequence[Mapping[str, float]]) -> Placement:
    """A bundle for each engine, so that its members share a machine; if there is no room, one for each worker.

    Args:
        worker: resources of one worker, such as ``{"CPU": 1, "GPU": 1}``.
        machines: resources of each machine.
    """
    engine = {name: amount * workers.tensor_parallel for name, amount in worker.items()}
    fitting = sum(int(min(m.get(name, 0) // amount for name, amount in engine.items() if amount)) for m in machines)
    if fitting >= workers.num_engines:
        return Placement(bundles=[dict(engine)] * workers.num_engines, workers_per_bundle=workers.tensor_parallel)
    return Placement(bundles=[dict(worker)] * workers.num_workers, workers_per_bundle=1)
