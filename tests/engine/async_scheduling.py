"""vLLM's asynchronous scheduling, its default on a GPU, switched on for its CPU build.

One step then returns the tokens of the batch before, while the next one is computed: a step may give no delta, or
several, and an abort drops the batch under way. ``RLPOST_CONTRACT_ASYNC=1`` switches it on for the engine's tests.
"""

from __future__ import annotations

import contextlib
from typing import Any


class _Event:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def record(self, *arguments: Any) -> None: ...
    def wait(self, *arguments: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        import torch

        self.device = torch.device("cpu")

    def wait_stream(self, *arguments: Any) -> None: ...
    def synchronize(self) -> None: ...


def switch_on() -> None:
    """Before the engine is built. What vLLM awaits on a GPU's streams is done at once on a CPU."""
    import torch
    from vllm.platforms.cpu import CpuPlatform

    for name, stand_in in (("Event", _Event), ("Stream", _Stream)):
        setattr(torch.cuda, name, stand_in)
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment]
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
