"""What vLLM changes in its process and what it must not do in ours, as context managers around the calls that do it.

Everything is restored when a context is left. Called by ``engine.vllm`` only.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Building an engine seeds every generator, sets LOCAL_WORLD_SIZE to the tensor-parallel size, and on a CPU turns
    ``torch.set_num_threads`` into a no-op."""
    import torch

    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    python_rng, numpy_rng = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch_rng_kept(device):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if local_world_size is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_world_size


@contextlib.contextmanager
def torch_rng_kept(device: str) -> Iterator[None]:
    """About 10 microseconds on a CPU; torch.random.fork_rng would visit every GPU of the machine."""
    import torch

    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if device != "cpu" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


@contextlib.contextmanager
def weights_left_unpacked() -> Iterator[None]:
    """vLLM repacks linear weights for oneDNN when a model is loaded and then computes with the packed copy, which
    later publications do not reach (a tied lm_head would silently stay old). Plain ``linear`` costs 5 to 18 % of a
    decoding step on a CPU and accepts new weights in place."""
    import torch
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


@contextlib.contextmanager
def no_shared_memory() -> Iterator[None]:
    """Members of an engine built in this context communicate through sockets only.

    On a CPU, vLLM adds the members' parts in a file in /dev/shm whose name depends on their ranks alone: two runs on
    one machine would share it, and the survivors of a killed member would wait in it forever. Its queue between
    members, which an externally driven engine does not use, is a file there that a killed member leaves behind.
    """
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    form, shares = parallel_state.init_model_parallel_group, CpuCommunicator._all_group_ranks_share_shm_group_name

    def form_without_queue(*args: Any, **kwargs: Any) -> Any:
        return form(*args, **{**kwargs, "use_message_queue_broadcaster": False})

    parallel_state.init_model_parallel_group = form_without_queue
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    try:
        yield
    finally:
        parallel_state.init_model_parallel_group = form
        CpuCommunicator._all_group_ranks_share_shm_group_name = shares
