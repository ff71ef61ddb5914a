"""The process group of the trainer's ranks. Called once per process, by start-up, before any engine is built.

An inference engine built first would leave DeepSpeed a world of one rank and no gradient exchange, silently.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

REQUIRED_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

# A rank may wait for the others through a whole generation phase; torch's ten minutes would end the run.
TIMEOUT = timedelta(hours=6)


def init_process_group(rank: int, world: int, store: Any = None, device: str = "cpu") -> None:
    """Start torch.distributed (gloo on a CPU, nccl on a GPU) and tell DeepSpeed; a second call does nothing.

    Writes no environment. Start-up must have set RANK, WORLD_SIZE and LOCAL_RANK (DeepSpeed reads LOCAL_RANK even with
    one rank) and, without a GPU, ``DS_ACCELERATOR=cpu``, all before DeepSpeed is first imported. With one rank and no
    ``store`` everything stays in this process and no port is opened; more ranks need a store they share.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    missing = [name for name in REQUIRED_ENVIRONMENT if name not in os.environ]
    if device == "cpu" and os.environ.get("DS_ACCELERATOR") != "cpu":
        missing.append("DS_ACCELERATOR=cpu")
    assert not missing, f"start-up must set {', '.join(missing)} before the process group is made"
    assert world == 1 or store is not None, "more than one rank needs a shared store"

    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce for the CPU here (two minutes, and an error without ninja).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device == "cpu" else "nccl"
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, store=store or dist.HashStore(), rank=rank, world_size=world, timeout=TIMEOUT)
    deepspeed.init_distributed(backend)
