"""Moving ZeRO's states, and a frozen model, between the device and host memory, so that the engine can have the device.

Host copies are page-locked where there is a GPU, without which a copy is several times slower; they are allocated once,
since locking gigabytes takes longer than copying them. Called by ``train.deepspeed_trainer``; on a CPU there is nowhere
to move to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class HostBuffers:
    """A host copy of each tensor of a list, kept for the next time."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def move_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """The tensors' data leave the device; a tensor that is new or has another shape gets a new buffer."""
        for index, tensor in enumerate(tensors):
            known = self._buffers[index] if index < len(self._buffers) else None
            if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
                known = _empty_on_host(tensor.shape, tensor.dtype)
                self._buffers[index : index + 1] = [known]
            known.copy_(tensor.data, non_blocking=True)
        _wait()  # before anyone reads a buffer, or the device's memory is given away
        for tensor, buffer in zip(tensors, self._buffers, strict=False):
            tensor.data = buffer

    def move_back(self, tensors: Sequence[torch.Tensor], device: torch.device | str) -> None:
        for tensor in tensors:
            tensor.data = torch.empty_like(tensor.data, device=device).copy_(tensor.data, non_blocking=True)
        _wait()


class StatesOffload:
    """Of one DeepSpeed engine: parameters, master weights, optimizer states and gradient buffers."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._buffers = HostBuffers()

    def offload(self) -> None:
        """All of them leave the device."""
        if self._is_native():
            self._engine.offload_states()
        else:
            self._offload_stage3()
        torch.cuda.empty_cache()

    def reload(self) -> None:
        """The reverse of :meth:`offload`; the numbers come back bit for bit."""
        self._engine.reload_states()
        if not self._is_native() and self._engine.zero_offload_optimizer() is None:
            self._buffers.move_back(self.optimizer_tensors(), self._engine.device)

    def _is_native(self) -> bool:
        """At stage 3 DeepSpeed offloads optimizer states of its own FusedAdam only (an assertion on the class)."""
        if self._engine.zero_optimization_stage() < 3:
            return True
        return type(self._engine.optimizer.optimizer).__name__ == "FusedAdam"

    def _offload_stage3(self) -> None:
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        self._engine.offload_states(include=[State.lp_params, State.lp_grads, State.contiguous_grad_buffer])
        if self._engine.zero_offload_optimizer() is None:  # else they live in host memory for good
            self._buffers.move_out(self.optimizer_tensors())

    def optimizer_tensors(self) -> list[torch.Tensor]:
        """Stage 3's master weights and the states of the optimizer, which are fewer before its first step."""
        zero = self._engine.optimizer
        states = [v for state in zero.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return [*zero.fp32_partitioned_groups_flat, *states]


class FrozenModule:
    """A module that never changes, and is on the device only while it is used: its host copy stays as it is.

    Args:
        module: in host memory. All its numbers of a dtype move into one buffer (on a GPU, page-locked memory is given
            in powers of two).
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._tensors = [*module.parameters(), *module.buffers()] if device.type != "cpu" else []
        self._host = _copy_to_host(self._tensors)
        self._drop_device_copy()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = _copy_to_device(host, self._device)
        try:
            yield self._module
        finally:
            self._drop_device_copy()

    def _drop_device_copy(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host


def _copy_to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in one buffer for each dtype."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    flat = {dtype: _empty_on_host(torch.Size([size]), dtype) for dtype, size in sizes.items()}
    used = dict.fromkeys(sizes, 0)
    copies = []
    for tensor in tensors:
        start = used[tensor.dtype]
        used[tensor.dtype] += tensor.numel()
        copies.append(flat[tensor.dtype][start : used[tensor.dtype]].view(tensor.shape).copy_(tensor.data))
    return copies


def _copy_to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, non_blocking=True)


def _empty_on_host(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
