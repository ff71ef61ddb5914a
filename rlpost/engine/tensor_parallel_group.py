"""The members of one engine as a gloo group of the trainer's processes: the network side of ``engine.lockstep``.

The groups are part of the process group created by the trainer (``train.process_group``): they use its store and need
no port of their own. Called by ``workers.local.start_worker``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class GlooMembers:
    """Implements ``engine.lockstep.Members``; build it with :func:`form_groups`."""

    def __init__(self, ranks: Sequence[int], rank: int, group: object) -> None:
        """``ranks``: the engine members' ranks in the world, in order. ``rank``: this process's rank in the world."""
        self.rank = ranks.index(rank)
        self.names: Sequence[str] = [f"worker {r}" for r in ranks]
        self._leader, self._group = ranks[0], group

    def gather(self, row: np.ndarray) -> np.ndarray:
        import torch
        import torch.distributed as dist

        rows = [torch.empty(len(row), dtype=torch.int64) for _ in self.names]
        dist.all_gather(rows, torch.from_numpy(row), group=self._group)
        return torch.stack(rows).numpy()

    def share(self, payload: bytes, num_bytes: int) -> bytes:
        import torch
        import torch.distributed as dist

        data = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            if self.rank == 0
            else torch.empty(num_bytes, dtype=torch.uint8)
        )
        dist.broadcast(data, src=self._leader, group=self._group)
        return data.numpy().tobytes()


def form_groups(groups: Sequence[Sequence[int]], rank: int) -> GlooMembers:
    """This rank's group. Every rank of the world calls it with the same ``groups``, after creating the process
    group."""
    import torch.distributed as dist

    formed = [dist.new_group(list(ranks), backend="gloo") for ranks in groups]  # every rank takes part in each
    mine = next(n for n, ranks in enumerate(groups) if rank in ranks)
    return GlooMembers(groups[mine], rank, formed[mine])
