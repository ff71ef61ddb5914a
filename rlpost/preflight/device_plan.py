"""The memory plan of a configuration on one device, what it decides, and how ``rlpost check`` prints it.

Never imports torch: what a device has is asked of ``nvidia-smi``, or of the kernel for a CPU. Called by ``checks``, and
by ``session``, which has :func:`choose_sleep` decide whether the engine stays awake.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.models.shape import kv_bytes
from rlpost.preflight.memory_plan import Item, MemoryPlan, plan_memory
from rlpost.workers.runtime import has_gpu

ASSUMED_GPU_BYTES = 80 << 30  # an A100's or H100's, for a plan on a machine without a GPU
# The larger of the two is left free where the engine stays awake, for what the plan leaves out: CUDA's context and
# graphs, temporary buffers, and what the allocator cannot give back.
AWAKE_MARGIN_SHARE, AWAKE_MARGIN_BYTES = 0.1, 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlan:
    """``cfg`` is resolved for ``device``; ``total``: bytes of the device, None if unknown."""

    cfg: Config
    shape: Mapping[str, Any]
    device: str
    total: int | None
    sequence: int  # tokens of the longest prompt and response
    memory: MemoryPlan

    @property
    def settings(self) -> str:
        train = self.cfg.train
        return (
            f"{self.cfg.model.dtype}, ZeRO stage {train.zero_stage}, gradients summed in {train.grad_accum_dtype}, "
            "one device, an estimate"
        )

    def describe(self) -> list[str]:
        lines = [*_describe_items(self.memory), _describe_kv(self)]
        if self.device == "cuda":
            lines.append(f"engine.sleep={self.cfg.engine.sleep}: {_describe_sleep(self)}")
        return lines


def plan_device(
    cfg: Config, shape: Mapping[str, Any], context: int | None, device: str, total: int | None, free: int | None = None
) -> DevicePlan | None:
    """None for a model that cannot be counted. ``context``: tokens of prompt and response, None: unknown. ``free``:
    what of ``total`` nobody else has; None: all."""
    free = total if free is None else free
    cfg = choose_sleep(resolve(cfg, device=device, threads=1), shape, context, free=free, total=total)
    memory = _plan(cfg, shape, context, total)
    if memory is None:
        return None
    sequence = _longest_sequence(cfg, context)
    return DevicePlan(cfg=cfg, shape=shape, device=device, total=total, sequence=sequence, memory=memory)


def choose_sleep(
    cfg: Config, shape: Mapping[str, Any], context: int | None, *, free: int | None, total: int | None
) -> Config:
    """A resolved configuration with ``engine.sleep`` decided: never, where all fits on a GPU with a margin to spare.

    ``free``: bytes that the run may use, ``total``: bytes of the device; None: unknown.
    """
    if cfg.engine.sleep != "auto":
        return cfg
    assert cfg.device == "cuda", "resolved"
    awake = replace(cfg, engine=replace(cfg.engine, sleep="never"))
    asleep = replace(cfg, engine=replace(cfg.engine, sleep="always"))
    if free is None or total is None or cfg.cluster.kind != "local":
        return asleep
    memory = _plan(awake, shape, context, total)
    fits = memory is not None and memory.peak_bytes + margin_bytes(total) <= free
    return awake if fits else asleep


def choose_sleep_here(cfg: Config, shape: Mapping[str, Any], context: int) -> Config:
    """:func:`choose_sleep` with what this machine's GPUs have."""
    if cfg.engine.sleep != "auto":
        return cfg
    return choose_sleep(cfg, shape, context, free=free_device_bytes(cfg.device), total=device_bytes(cfg.device))


def margin_bytes(total: int) -> int:
    return max(int(AWAKE_MARGIN_SHARE * total), AWAKE_MARGIN_BYTES)


def _plan(cfg: Config, shape: Mapping[str, Any], context: int | None, total: int | None) -> MemoryPlan | None:
    sequence = _longest_sequence(cfg, context)
    # Like the engine: room for max_slots sequences of full length, but at most half of the memory.
    members, sequences = cfg.engine.tensor_parallel, cfg.slots_per_engine + cfg.rollout.keep_kv
    wanted = kv_bytes(shape, num_tokens=sequences * sequence, dtype=cfg.model.dtype, tensor_parallel=members)
    bounded = wanted if total is None else min(wanted, total // 2)
    train = cfg.train
    assert train.zero_stage is not None and train.max_row_tokens is not None, "resolved"
    return plan_memory(
        shape,
        dtype=cfg.model.dtype,
        device=cfg.device,
        zero_stage=train.zero_stage,
        grad_accum_dtype=train.grad_accum_dtype,
        world_size=1,
        offload_optimizer=train.offload_optimizer,
        offload_params=train.offload_params,
        sleep_offload=train.sleep_offload,
        gradient_checkpointing=train.gradient_checkpointing,
        reference=cfg.algo.kl_coef > 0,
        keep_kv=cfg.rollout.keep_kv,
        kv_cache_bytes=cfg.engine.kv_cache_bytes or bounded,
        row_tokens=max(train.max_row_tokens, sequence),
        chunk_tokens=train.logprob_chunk_tokens,
        tensor_parallel=members,
        awake=cfg.engine.sleep == "never",
    )


def _longest_sequence(cfg: Config, context: int | None) -> int:
    """Tokens of prompt and response."""
    if context is not None and cfg.data.max_prompt_tokens is None:
        return context
    return (cfg.data.max_prompt_tokens or 0) + cfg.rollout.max_response_tokens


# -- in words ------------------------------------------------------------------------------------------------------


def _describe_items(plan: MemoryPlan) -> list[str]:
    lines = [_row("", "generating", "backward", "step")]
    for item in plan.items:
        size = format_bytes(item.num_bytes)
        columns = [size if when else "-" for when in (item.in_generation, item.in_backward, item.in_step)]
        lines.append(_row(item.name, *columns) + _where(item))
    phases = (plan.generating_bytes, plan.backward_bytes, plan.step_bytes)
    lines.append(_row("on the device", *map(format_bytes, phases)) + f"  peak {format_bytes(plan.peak_bytes)}")
    if plan.peak_bytes == plan.publishing_bytes:
        lines[-1] += ", while weights are published"
    if plan.host_bytes:
        lines.append(f"{'in host memory beside it':44}{format_bytes(plan.host_bytes):>10}")
    return lines


def _row(name: str, *columns: str) -> str:
    return f"{name:42}" + "".join(f"{column:>12}" for column in columns)


def _where(item: Item) -> str:
    return "" if item.on_device else "  in host memory"


def _describe_kv(plan: DevicePlan) -> str:
    """What the planned KV cache means for the number of samples in flight."""
    cfg, sequence = plan.cfg, plan.sequence
    cache = next(item.num_bytes for item in plan.memory.items if item.name == "KV cache")
    one = kv_bytes(plan.shape, num_tokens=sequence, dtype=cfg.model.dtype, tensor_parallel=cfg.engine.tensor_parallel)
    fit = cache // one
    wanted = cfg.rollout.max_in_flight or cfg.slots_per_engine
    line = f"the KV cache holds {fit:,} samples of {sequence:,} tokens"
    if fit >= wanted:
        return f"{line}: all {wanted} in flight"
    if cfg.rollout.max_in_flight is not None or cfg.num_engines > 1:
        return f"{line}; with {wanted} in flight, vLLM preempts some when it is full"
    return f"{line}: this many are in flight at first, then as many as fit with the lengths seen, up to {wanted}"


def _describe_sleep(plan: DevicePlan) -> str:
    if plan.cfg.engine.sleep == "never":
        return "engine and trainer both keep their memory, nothing moves between the phases"
    if plan.cfg.rollout.keep_kv:
        return "the trainer leaves its memory to the engine, which keeps its own (rollout.keep_kv)"
    return "engine and trainer leave the memory to each other in turns"


def format_bytes(num_bytes: int) -> str:
    """Binary units, three digits: ``1.46 GiB``."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


# -- the device ----------------------------------------------------------------------------------------------------


def device_bytes(device: str) -> int | None:
    """Memory of the device, or of the machine on a CPU; None if it cannot be known without a device."""
    if device == "cpu":
        return _first_number(Path("/proc/meminfo").read_text(), 1024) if Path("/proc/meminfo").is_file() else None
    return _ask_driver("memory.total")


def free_device_bytes(device: str) -> int | None:
    """Of a GPU, as the driver tells: the least that any has free, since it numbers them in its own order."""
    return _ask_driver("memory.free") if device == "cuda" else None


def _ask_driver(what: str) -> int | None:
    """The smallest number of all GPUs, bytes."""
    if not has_gpu() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # the plan is printed without a comparison
    numbers = [int(word) << 20 for word in output.split() if word.isdigit()]
    return min(numbers, default=None)


def _first_number(text: str, unit: int) -> int | None:
    numbers: list[Any] = [word for word in text.split() if word.isdigit()]
    return int(numbers[0]) * unit if numbers else None
