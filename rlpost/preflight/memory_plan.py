"""How much memory a run needs on each device, before one is touched.

Owns the arithmetic only: pure functions from a model's shape and the settings to bytes. Never looks at a device or a
file; ``checks`` calls it and prints the plan. An estimate: allocator overhead, CUDA graphs and temporary buffers are
not counted, so leave a margin.

Trainer states follow ZeRO (arXiv 1910.02054, section 3.1): with bf16, 2 bytes of parameters, 2 of gradients and 12 of
optimizer states (float32 master copy, Adam's two moments) per parameter. Stage 1 divides the 12 by the number of ranks,
stage 2 also the gradients, stage 3 also the parameters. DeepSpeed keeps a separate master copy in float32 runs as well,
so there it is 4 + 4 + 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlpost.models.shape import BYTES, DENSE_TYPES, count_params, head_size, kv_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Something that takes memory, and when. ``on_device`` is False for host memory beside a GPU."""

    name: str
    num_bytes: int
    while_generating: bool
    while_training: bool
    on_device: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes per device. The peak is the larger of the two phases, which never overlap."""

    items: tuple[Item, ...]

    @property
    def generating_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items if i.on_device and i.while_generating)

    @property
    def training_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items if i.on_device and i.while_training)

    @property
    def publishing_bytes(self) -> int:
        """Weights are copied directly from trainer to engine: on a GPU, both copies and nothing else in between."""
        names = ("parameters", "engine weights")
        return sum(i.num_bytes for i in self.items if i.on_device and i.name in names)

    @property
    def peak_bytes(self) -> int:
        return max(self.generating_bytes, self.training_bytes, self.publishing_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory beside a GPU, at its maximum."""
        host = [i for i in self.items if not i.on_device]
        generating = sum(i.num_bytes for i in host if i.while_generating)
        return max(generating, sum(i.num_bytes for i in host if i.while_training))


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


def logits_bytes(shape: Mapping[str, Any], *, chunk_tokens: int) -> int:
    """The logits of one chunk and their gradient in float32, and the head's gradient, which is summed in float32."""
    return 4 * int(shape["vocab_size"]) * (2 * chunk_tokens + int(shape["hidden_size"]))


def plan_memory(
    shape: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
    zero_stage: int,
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
) -> MemoryPlan | None:
    """The plan for one device; None for a model_type outside DENSE_TYPES.

    Args:
        dtype, device: resolved, "float32" or "bfloat16", "cpu" or "cuda".
        reference: whether a frozen reference is held (KL coefficient above 0).
        keep_kv: whether the engine keeps its memory while the trainer works, also on a GPU.
        row_tokens: the longest packed row.
        tensor_parallel: devices of one engine, which divide its weights.
    """
    if shape.get("model_type", "qwen3") not in DENSE_TYPES:
        return None
    parameters = count_params(shape)
    width, gpu = BYTES[dtype], device == "cuda"
    share = {stage: world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    # On a CPU, sleeping moves nothing. On a GPU, the engine's memory is released while the trainer works, and, with
    # sleep_offload, the trainer's while the engine works.
    stays = not (gpu and sleep_offload)
    engine_stays = not gpu or keep_kv

    def state(name: str, num_bytes: int, offloaded: bool) -> Item:
        on_device = not (gpu and offloaded)
        return Item(
            name=name,
            num_bytes=num_bytes,
            while_generating=stays or not on_device,
            while_training=True,
            on_device=on_device,
        )

    def only_training(name: str, num_bytes: int) -> Item:
        return Item(name=name, num_bytes=num_bytes, while_generating=False, while_training=True)

    def engine(name: str, num_bytes: int) -> Item:
        return Item(name=name, num_bytes=num_bytes, while_generating=True, while_training=engine_stays)

    activations = activation_bytes(shape, row_tokens=row_tokens, dtype=dtype, checkpointing=gradient_checkpointing)
    items = [
        state("parameters", parameters * width // share[3], offload_params),
        state("gradients", parameters * width // share[2], False),
        state("float32 master copy", parameters * 4 // share[1], offload_optimizer),
        state("Adam's two moments", parameters * 8 // share[1], offload_optimizer),
        only_training("activations of one row", activations),
        only_training("logits of one chunk, head gradient", logits_bytes(shape, chunk_tokens=chunk_tokens)),
        engine("engine weights", parameters * width // tensor_parallel),
        engine("KV cache", kv_cache_bytes),
    ]
    if reference:
        items.append(state("frozen reference", parameters * width, True))
    if gpu and sleep_offload:
        asleep = sum(i.num_bytes for i in items[:4] if i.on_device)
        items.append(
            Item(
                name="trainer asleep",
                num_bytes=asleep,
                while_generating=True,
                while_training=False,
                on_device=False,
            )
        )
    return MemoryPlan(items=tuple(items))
