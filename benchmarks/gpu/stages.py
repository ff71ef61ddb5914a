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

    def run(self, settings: Settings, record: Record) -> None:
        function: Callable[..., None] = getattr(importlib.import_module(f"benchmarks.gpu.{self.module}"), self.function)
        function(settings, record, *([] if self.argument is None else [self.argument]))


PARTS = (
    Part(stage=0, name="machine", module="machine", needs_s=10, limit_s=45),
    Part(stage=1, name="canary-ieee", module="canary", argument="ieee", needs_s=20, limit_s=90),
    Part(stage=1, name="canary-tf32", module="canary", argument="tf32", needs_s=20, limit_s=60),
    Part(stage=2, name="contract", module="contract", needs_s=40, limit_s=90),
    Part(stage=3, name="demo", module="demo", needs_s=45, limit_s=120),
    Part(stage=5, name="colocation", module="colocation", needs_s=60, limit_s=120),
    Part(stage=6, name="update-large", module="update", argument="large", needs_s=40, limit_s=75),
    Part(stage=6, name="update-0.6b", module="update", argument="0.6b", needs_s=20, limit_s=50),
    Part(stage=7, name="decode-large", module="decode", argument="large", needs_s=40, limit_s=75),
    Part(stage=7, name="decode-0.6b", module="decode", argument="0.6b", needs_s=25, limit_s=50),
    Part(stage=4, name="keep-kv-slots", module="keep_kv", argument="slots", needs_s=20, limit_s=60),
    Part(stage=4, name="keep-kv-full", module="keep_kv", argument="full", needs_s=20, limit_s=60),
    Part(stage=8, name="zero3-adamw", module="zero3", argument="adamw", needs_s=15, limit_s=45),
    Part(stage=8, name="zero3-fused", module="zero3", argument="fused", needs_s=15, limit_s=90),
    Part(stage=9, name="caches", module="machine", function="caches", needs_s=2, limit_s=30),
)
