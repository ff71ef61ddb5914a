"""How much memory a run needs on each device, before one is touched.

Owns the arithmetic only: pure functions from a model's shape and the settings to bytes. Never looks at a device or a
file; ``preflight.device_plan`` calls it. An estimate: allocator overhead, CUDA graphs and temporary buffers of the
model's kernels are not counted, so leave a margin. What the trainer holds beside a row's activations is
``preflight.trainer_memory``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlpost.models.shape import BYTES, DENSE_TYPES, count_params, head_size, kv_heads
from rlpost.preflight.trainer_memory import TrainerMemory, plan_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Something that takes memory, and when. ``on_device`` is False for host memory beside a GPU."""

    name: str
    num_bytes: int
    in_generation: bool = False
    in_backward: bool = False
    in_step: bool = False
    in_publication: bool = False
    on_device: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes per device. The peak is the largest of the phases, which never overlap."""

    items: tuple[Item, ...]

    @property
    def generating_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items if i.on_device and i.in_generation)

    @property
    def backward_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items if i.on_device and i.in_backward)

    @property
    def step_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items if i.on_device and i.in_step)

    @property
    def training_bytes(self) -> int:
        return max(self.backward_bytes, self.step_bytes)

    @property
    def publishing_bytes(self) -> int:
        """Weights are copied directly, while the trainer is awake and the engine has its weights only."""
        return sum(i.num_bytes for i in self.items if i.on_device and i.in_publication)

    @property
    def peak_bytes(self) -> int:
        return max(self.generating_bytes, self.training_bytes, self.publishing_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory beside a GPU, at its maximum."""
        host = [i for i in self.items if not i.on_device]
        generating = sum(i.num_bytes for i in host if i.in_generation)
        return max(generating, sum(i.num_bytes for i in host if i.in_backward))


def activation_bytes(shape: Mapping[str, Any], *, row_tokens: int, dtype: str, checkpointing: bool) -> int:
    """What the forward pass of one packed row keeps for the backward pass.

    Counted as in arXiv 2205.05198, section 4, for a block with SwiGLU and an attention kernel that keeps no scores: per
    token and layer, two residuals and two norm outputs, query, key and value before and after rotation, the attention's
    output, and four vectors of the MLP are kept. With checkpointing (its section 5) each layer keeps only its input,
    and one layer at a time is recomputed.
    """
    hidden, layers = int(shape["hidden_size"]), int(shape["num_hidden_layers"])
    query, key_value = int(shape["num_attention_heads"]) * head_size(shape), kv_heads(shape) * head_size(shape)
    layer = 4 * hidden + 2 * (query + 2 * key_value) + query + 4 * int(shape["intermediate_size"])
    kept = layers * hidden + layer if checkpointing else layers * layer
    return kept * row_tokens * BYTES[dtype]


def logits_bytes(shape: Mapping[str, Any], *, chunk_tokens: int, dtype: str) -> int:
    """The logits of one chunk and their gradient in float32, and the head's gradient: summed in float32, and what one
    chunk adds to it in the dtype."""
    vocabulary, hidden = int(shape["vocab_size"]), int(shape["hidden_size"])
    head = 4 if dtype == "float32" else 4 + BYTES[dtype]
    return vocabulary * (4 * 2 * chunk_tokens + head * hidden)


def plan_memory(
    shape: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
    zero_stage: int,
    grad_accum_dtype: str,
    world_size: int,
    offload_optimizer: bool,
    offload_params: bool,
    sleep_offload: bool,
    gradient_checkpointing: bool,
    reference: bool,
    keep_kv: bool,
    kv_cache_bytes: int,
    row_tokens: int,
    chunk_tokens: int,
    tensor_parallel: int = 1,
    awake: bool = False,
) -> MemoryPlan | None:
    """The plan for one device; None for a model_type outside DENSE_TYPES.

    Args:
        dtype, device, zero_stage, grad_accum_dtype: resolved.
        reference: whether a frozen reference is held (KL coefficient above 0).
        keep_kv: whether the engine keeps its memory while the trainer works, also on a GPU.
        row_tokens: the longest packed row.
        tensor_parallel: devices of one engine, which divide its weights.
        awake: whether engine and trainer both keep their memory all the time (engine.sleep=never).
    """
    if shape.get("model_type", "qwen3") not in DENSE_TYPES:
        return None
    parameters = count_params(shape)
    width, gpu = BYTES[dtype], device == "cuda"
    trainer = plan_trainer(
        shape,
        width=width,
        sums_width=BYTES[grad_accum_dtype],
        gpu=gpu,
        zero_stage=zero_stage,
        world_size=world_size,
        offload_optimizer=offload_optimizer,
    )
    # On a CPU, sleeping moves nothing. On a GPU, the engine's memory is released while the trainer works, and, with
    # sleep_offload, the trainer's while the engine works.
    sleeps = gpu and sleep_offload and not awake and not offload_params
    engine_stays = not gpu or keep_kv or awake

    items = _trainer_items(trainer, gpu=gpu, offload_params=offload_params, sleeps=sleeps)
    for name, num_bytes in (
        (
            "activations of one row",
            activation_bytes(shape, row_tokens=row_tokens, dtype=dtype, checkpointing=gradient_checkpointing),
        ),
        ("logits of one chunk, head gradient", logits_bytes(shape, chunk_tokens=chunk_tokens, dtype=dtype)),
    ):
        items.append(Item(name=name, num_bytes=num_bytes, in_backward=True))
    for name, num_bytes in (("engine weights", parameters * width // tensor_parallel), ("KV cache", kv_cache_bytes)):
        items.append(
            Item(
                name=name,
                num_bytes=num_bytes,
                in_generation=True,
                in_backward=engine_stays,
                in_step=engine_stays,
                in_publication=engine_stays or name == "engine weights",
            )
        )
    if reference:  # on a GPU it visits the device only before an update, where no gradients are yet
        held = pinned(parameters * width) if gpu else parameters * width
        items.append(_always("frozen reference", held, on_device=not gpu))
    if sleeps:
        asleep = sum(pinned(buffer) for buffer in trainer.moved_in_sleep)
        items.append(Item(name="trainer asleep", num_bytes=asleep, in_generation=True, on_device=False))
    return MemoryPlan(items=tuple(items))


def _always(name: str, num_bytes: int, *, on_device: bool) -> Item:
    return Item(
        name=name,
        num_bytes=num_bytes,
        in_generation=True,
        in_backward=True,
        in_step=True,
        in_publication=True,
        on_device=on_device,
    )


def _trainer_items(trainer: TrainerMemory, *, gpu: bool, offload_params: bool, sleeps: bool) -> list[Item]:
    items = []
    for name, num_bytes in trainer.held.items():
        on_device = not (gpu and (name in trainer.offloaded or (offload_params and name == "parameters")))
        size = num_bytes if on_device or name == "Adam's two moments" else pinned(num_bytes)
        item = _always(name, size, on_device=on_device)
        items.append(replace(item, in_generation=not (on_device and sleeps)))
    for name, num_bytes in trainer.from_backward_to_step.items():
        items.append(Item(name=name, num_bytes=num_bytes, in_backward=True, in_step=True))
    for name, num_bytes in trainer.in_backward.items():
        items.append(Item(name=name, num_bytes=num_bytes, in_backward=True))
    for name, num_bytes in trainer.in_step.items():
        items.append(Item(name=name, num_bytes=num_bytes, in_step=True))
    return items


def pinned(num_bytes: int) -> int:
    """What page-locked host memory really takes: PyTorch's allocator rounds each block up to a power of two.

    torch 2.13 has a setting that rounds only small blocks (``pinned_max_round_threshold_mb``). It is not used: a freed
    block is handed out again by its power of two, without a look at its size (``CachingHostAllocator.h``,
    ``get_free_block``), so a smaller block could be given for a larger one.
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
