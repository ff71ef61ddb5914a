"""What DeepSpeed holds of a model, and when: bytes a device, without a row's activations.

The states follow ZeRO (arXiv 1910.02054, section 3.1): parameters in the model's dtype, and 12 bytes of optimizer
states a parameter (float32 master copy, Adam's two moments), also in float32 runs. Stage 1 divides the 12 by the number
of ranks, stage 2 also the gradients, stage 3 also the parameters. The rest is read from DeepSpeed 0.19.8
(``stage_1_and_2.py``, ``stage3.py``) and compared with a process's memory by ``benchmarks/trainer_memory.py``, for one
rank: within 10 % at all stages, dtypes and with the optimizer offloaded (``tests/preflight/test_trainer_memory.py``).

Gradients are summed between the rows of an optimizer step, in ``grad_accum_dtype``:

- Stage 1 sums in ``param.grad``, whole on every rank. In the step they move into a partition; that is then copied into
  a flat one and, unless it is float32, that into float32.
- Stage 2 reduces each row's gradients in a bucket. With float32 sums of a bfloat16 model they are added to one flat
  buffer, which the optimizer uses as it is. Otherwise a row's partition is a buffer of its own, added to the one
  before, and the step copies as at stage 1.
- Stage 3 has bucket and flat buffer for good; in the step it copies the flat buffer, by groups of at most 1e9 numbers.

Before all this, the norm is taken of each gradient in float64. With ``train.offload_optimizer`` the states and a
float32 gradient are in host memory, with staging buffers of the largest weight on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpost.models.shape import count_params, largest_parameter

BUCKET = 500_000_000  # numbers reduced at once, at most (``train.zero``)
GROUP = 1_000_000_000  # numbers, DeepSpeed's sub_group_size and stage3_max_live_parameters


@dataclass(kw_only=True, slots=True)
class TrainerMemory:
    """Bytes by name. ``offloaded``: names in ``held`` that are in host memory where the device is a GPU."""

    held: dict[str, int]
    from_backward_to_step: dict[str, int] = field(default_factory=dict)
    in_backward: dict[str, int] = field(default_factory=dict)
    in_step: dict[str, int] = field(default_factory=dict)
    offloaded: set[str] = field(default_factory=set)
    moved_in_sleep: list[int] = field(default_factory=list)  # the flat buffers that sleep copies to host memory


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    parameters: int
    own: int  # numbers whose states this rank has
    largest: int  # of one weight, as far as it is this rank's
    width: int  # bytes of a parameter
    sums_width: int  # bytes of the sum of its gradients
    gpu: bool
    offloaded: bool

    @property
    def bucket_bytes(self) -> int:
        return min(self.parameters, BUCKET) * self.width

    @property
    def in_float32(self) -> int:
        """Bytes of a number's float32 copy where its sum has another dtype."""
        return 4 if self.sums_width < 4 else 0


def plan_trainer(
    shape: Mapping[str, Any],
    *,
    width: int,
    sums_width: int,
    gpu: bool,
    zero_stage: int,
    world_size: int,
    offload_optimizer: bool,
) -> TrainerMemory:
    """``width``, ``sums_width``: bytes of a parameter, and of the sum of its gradients."""
    parameters, largest = count_params(shape), largest_parameter(shape)
    own = parameters // world_size
    memory = TrainerMemory(
        held={
            "parameters": (own if zero_stage == 3 else parameters) * width,
            "float32 master copy": own * 4,
            "Adam's two moments": own * 8,
        }
    )
    memory.moved_in_sleep = [memory.held["parameters"]]
    if offload_optimizer:
        staging = largest * width if zero_stage < 3 else 0
        _offload(memory, own * 4, own * width + staging if staging else 0, staging)
    else:
        memory.moved_in_sleep += [own * 4] * 3
    stage = {1: _stage_1, 2: _stage_2, 3: _stage_3}[zero_stage]
    sizes = _Sizes(
        parameters=parameters,
        own=own,
        largest=min(largest, own),
        width=width,
        sums_width=sums_width,
        gpu=gpu,
        offloaded=offload_optimizer,
    )
    copies = stage(memory, sizes)
    memory.in_step["gradient copies of the step"] = max(copies, 8 * sizes.largest)  # the norm's, in float64
    return memory


def _offload(memory: TrainerMemory, gradients: int, updated: int, staging: int) -> None:
    memory.held["float32 gradients"] = gradients
    memory.offloaded |= {"float32 master copy", "Adam's two moments", "float32 gradients"}
    if staging:
        memory.held["updated parameters"] = updated
        memory.offloaded.add("updated parameters")
        memory.held["staging of gradients"] = staging


def _stage_1(memory: TrainerMemory, sizes: _Sizes) -> int:
    """Adds what the stage holds, and returns the bytes of the gradients' copies in the optimizer step."""
    whole, partition = sizes.parameters * sizes.width, sizes.own * sizes.width
    memory.from_backward_to_step["gradients"] = whole
    if sizes.gpu:  # allocated with the first gradient, but written in the step only, where gradients move into it
        memory.in_backward["gradient bucket"] = sizes.bucket_bytes
    if sizes.offloaded:
        return 0
    return max(partition, 2 * partition + sizes.own * sizes.in_float32 - whole)


def _stage_2(memory: TrainerMemory, sizes: _Sizes) -> int:
    bucket, partition = sizes.bucket_bytes, sizes.own * sizes.width
    if sizes.sums_width != sizes.width:  # slices are added to the flat buffer one by one, through a copy of the bucket
        memory.from_backward_to_step["gradients"] = sizes.own * sizes.sums_width
        memory.in_backward["gradients of one row"] = 2 * bucket + sizes.largest * sizes.sums_width
        return 0
    reduced = bucket if sizes.own == sizes.parameters else 2 * bucket  # of one rank it is a view
    if sizes.offloaded:
        memory.held["gradients"] = partition
        memory.offloaded.add("gradients")
        memory.in_backward["gradients of one row"] = reduced
        return sizes.largest * (8 + sizes.width)
    memory.from_backward_to_step["gradients"] = partition
    memory.in_backward["gradients of one row"] = reduced + partition
    return partition + sizes.own * sizes.in_float32


def _stage_3(memory: TrainerMemory, sizes: _Sizes) -> int:
    bucket, flat = sizes.bucket_bytes, sizes.own * sizes.sums_width
    memory.held["gradients"] = flat
    memory.held["gradient bucket"] = bucket
    # Gathered parameters are let go before the last bucket is reduced; where there are several, both are there.
    gathered = min(sizes.parameters, GROUP) * sizes.width
    converted = flat * min(sizes.parameters, BUCKET) // sizes.parameters if sizes.sums_width != sizes.width else 0
    reduced = bucket + max(converted, 0 if sizes.gpu else bucket)  # on a CPU, gloo has a copy of its own
    together = gathered + reduced if sizes.parameters > BUCKET else max(gathered, reduced)
    memory.in_backward["gathered parameters, gradients of one row"] = together
    if sizes.offloaded:
        memory.offloaded.add("gradients")
        return 0
    memory.moved_in_sleep.append(flat)
    return min(sizes.own, GROUP) * (sizes.sums_width + sizes.in_float32)
