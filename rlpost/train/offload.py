"""Moving ZeRO's states between the device and host memory, so that the engine can have the device.

Called by ``train.deepspeed_trainer`` on a GPU only: on a CPU there is nowhere to move them to.
"""

from __future__ import annotations

from typing import Any

import torch


def offload(engine: Any) -> None:
    """Parameters, master weights, optimizer states and gradient buffers leave the device."""
    if _native(engine):
        engine.offload_states()
    else:
        _offload_stage3(engine)
    torch.cuda.empty_cache()


def reload(engine: Any) -> None:
    """The reverse of :func:`offload`; the numbers come back bit for bit."""
    engine.reload_states()
    if not _native(engine):
        _reload_stage3(engine)


def _native(engine: Any) -> bool:
    """At stage 3 DeepSpeed offloads optimizer states of its own FusedAdam only (an assertion on the class)."""
    if engine.zero_optimization_stage() < 3:
        return True
    return type(engine.optimizer.optimizer).__name__ == "FusedAdam"


def _offload_stage3(engine: Any) -> None:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
    from deepspeed.runtime.zero.offload_states import offload_optimizer_states

    engine.offload_states(include=[State.lp_params, State.lp_grads, State.contiguous_grad_buffer])
    if engine.zero_offload_optimizer() is not None:
        return  # they live in host memory for good
    offload_optimizer_states(engine.optimizer.optimizer, "cpu")
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        master.data = master.data.to("cpu")


def _reload_stage3(engine: Any) -> None:
    from deepspeed.runtime.zero.offload_states import reload_optimizer_states

    if engine.zero_offload_optimizer() is not None:
        return
    device = engine.device
    reload_optimizer_states(engine.optimizer.optimizer, device)
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        master.data = master.data.to(device)
