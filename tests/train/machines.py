"""Gradient reductions and an optimizer of a user's own. Two ranks stand for two machines of one rank each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rlpost.train.optimization import Ranks


class WithinMachine:
    """What DeepSpeed asks of an ``mpu``; this rank is alone on its machine."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        groups = [dist.new_group([r]) for r in range(dist.get_world_size())]  # all ranks make all groups
        self._alone = groups[rank]

    def get_data_parallel_group(self) -> Any:
        return self._alone

    def get_data_parallel_group_ranks(self) -> list[int]:
        return [self._rank]

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> Any:
        return self._alone


class MeanOverMachines:
    def __init__(self, ranks: Ranks) -> None:
        assert ranks.neighbors == tuple(range(ranks.world)), "both ranks of this test run on one real machine"
        self.groups = WithinMachine(ranks.rank)
        self.world = ranks.world

    def exchange(self, gradients: Mapping[int, Sequence[torch.Tensor]]) -> None:
        for shards in gradients.values():
            for shard in shards:
                dist.all_reduce(shard)
                shard /= self.world


class Recorded:
    """One rank: what the exchange was given, and gradients ``scale`` times as large afterwards."""

    groups = None
    given: list[dict[int, int]] = []

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def exchange(self, gradients: Mapping[int, Sequence[torch.Tensor]]) -> None:
        Recorded.given.append({group: sum(s.numel() for s in shards) for group, shards in gradients.items()})
        for shards in gradients.values():
            for shard in shards:
                shard *= self.scale


def mean_over_machines(ranks: Ranks) -> MeanOverMachines:
    return MeanOverMachines(ranks)


def recorded(ranks: Ranks, *, scale: float) -> Recorded:
    assert (ranks.rank, ranks.world) == (0, 1)
    return Recorded(scale)


def sgd(module: torch.nn.Module, *, train: Any, device: str, ranks: Ranks, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=train.lr, momentum=momentum)
