"""The stages in the order in which they run: the cheapest and most telling first.

A stage of several parts takes a process for each: one process holds one vLLM engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.record import Record, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """``function`` of ``module``, in a process of its own."""

    stage: int
    name: str
    module: str
    function: str = "run"
    argument: str | None = None
    needs_s: float  # of a budget of 480 s: not started with less left
    limit_s: float  # killed after this long

    @property
    def label(self) -> str:
        return f"{self.stage}-{self.name}"

    @property
    def call(self) -> str:
        """What its process is told to run; see :func:`run_call`."""
        return ":".join([self.module, self.function, *([] if self.argument is None else [self.argument])])


def run_call(call: str, settings: Settings, record: Record) -> None:
    """``MODULE:FUNCTION``, or ``MODULE:FUNCTION:ARGUMENT``."""
    module, name, *arguments = call.split(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    function(settings, record, *arguments)


PARTS: tuple[Part, ...] = (
    Part(stage=0, name="machine", module="benchmarks.gpu.machine", needs_s=10, limit_s=45),
    Part(stage=1, name="canary-ieee", module="benchmarks.gpu.canary", argument="ieee", needs_s=20, limit_s=90),
    Part(stage=1, name="canary-tf32", module="benchmarks.gpu.canary", argument="tf32", needs_s=20, limit_s=60),
    Part(stage=2, name="contract", module="benchmarks.gpu.contract", needs_s=40, limit_s=90),
    Part(stage=3, name="demo", module="benchmarks.gpu.demo", needs_s=45, limit_s=120),
    Part(stage=5, name="colocation", module="benchmarks.gpu.colocation", needs_s=60, limit_s=120),
    Part(stage=6, name="update-large", module="benchmarks.gpu.update", argument="large", needs_s=40, limit_s=75),
    Part(stage=6, name="update-0.6b", module="benchmarks.gpu.update", argument="0.6b", needs_s=20, limit_s=50),
    Part(stage=7, name="decode-large", module="benchmarks.gpu.decode", argument="large", needs_s=40, limit_s=75),
    Part(stage=7, name="decode-0.6b", module="benchmarks.gpu.decode", argument="0.6b", needs_s=25, limit_s=50),
    Part(stage=4, name="keep-kv-slots", module="benchmarks.gpu.keep_kv", argument="slots", needs_s=20, limit_s=60),
    Part(stage=4, name="keep-kv-full", module="benchmarks.gpu.keep_kv", argument="full", needs_s=20, limit_s=60),
    Part(stage=8, name="zero3-adamw", module="benchmarks.gpu.zero3", argument="adamw", needs_s=15, limit_s=45),
    Part(stage=8, name="zero3-fused", module="benchmarks.gpu.zero3", argument="fused", needs_s=15, limit_s=90),
    Part(stage=9, name="caches", module="benchmarks.gpu.machine", function="caches", needs_s=2, limit_s=30),
)
