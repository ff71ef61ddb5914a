"""Stage 6: what a packed row costs, by attention, and what an optimizer step holds at its peak.

The same tokens in rows of few long and of many short sequences. ``varlen`` is what rlpost does on a GPU, torch's kernel
for sequences of several lengths; ``split`` is what it does elsewhere; ``slices``, with the smaller shapes only, is the
plainest way to write it down. Gradients are compared with those of ``split``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.colocation import negative_logprob
from benchmarks.gpu.random_policy import (
    GB,
    Need,
    Policy,
    build_random_trainer,
    choose_size,
    free_memory,
    packed_batch,
    prepare,
    shape_of,
    synchronize,
)
from benchmarks.gpu.record import Record, Settings

LIMIT = {"bfloat16": 2e-2, "float32": 1e-4}  # norm of the difference of two gradients over the norm of one
ROWS = {"4x4k": [4096] * 4, "16x1k": [1024] * 16, "64x256": [256] * 64}
SMALL_ROWS = {"2x64": [64] * 2, "3_lengths": [17, 96, 40], "8x16": [16] * 8}


def run(settings: Settings, record: Record, which: str) -> None:
    # Beside the peak of a step: activations of a row with checkpointing, and the head's logits.
    size = choose_size(settings, record, Need(bytes_per_param=24, extra_bytes=lambda size: 9 * GB), which)
    rows = SMALL_ROWS if settings.small else ROWS
    with TemporaryDirectory() as folder:
        policy = prepare(
            settings,
            size,
            Path(folder),
            train={
                "gradient_checkpointing": not settings.small,
                "max_row_tokens": max(map(sum, rows.values())),
            },
        )
        from rlpost.train.process_group import init_process_group

        init_process_group(0, 1, None, settings.device)
        compare_attention(settings, record, policy, rows)
        free_memory()
        measure_step(record, policy, rows)


# ---- one row forward and backward, without an optimizer


def compare_attention(settings: Settings, record: Record, policy: Policy, rows: dict[str, list[int]]) -> None:
    import torch

    from rlpost.train.forward import PolicyModule
    from rlpost.train.model import DTYPES, load_model

    torch.manual_seed(0)
    with torch.device(settings.device):
        lm = load_model(policy.folder, dtype=DTYPES[settings.dtype], device=settings.device, init="random")
    if policy.cfg.train.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    module = PolicyModule(lm, chunk_tokens=policy.cfg.train.logprob_chunk_tokens)
    record.note(attention=lm.config._attn_implementation)
    for row_name, lengths in rows.items():
        reference: dict[str, Any] = {}
        for name, attention in variants(settings, policy.size).items():
            with attention:
                seconds = min(backward_s(module, lengths, policy.vocab_size) for _ in range(2))
            gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
            record.note(**{f"{row_name}_{name}_s": seconds})
            record.note(**{f"{row_name}_{name}_tflop_s": row_flop(policy, lengths) / seconds / 1e12})
            if reference:
                apart = difference(gradients, reference)
                record.note(**{f"{row_name}_{name}_gradient_difference": apart})
                limit = LIMIT[settings.dtype]
                record.require(apart < limit, f"{row_name}: gradients of {name} {apart:.2g} apart, not below {limit}")
            reference = reference or gradients
            del gradients
        del reference
        free_memory()


def variants(settings: Settings, size: str) -> dict[str, AbstractContextManager[None]]:
    chosen: dict[str, AbstractContextManager[None]] = {"split": without_kernel()}
    if settings.on_gpu:
        chosen["varlen"] = nullcontext()
    if size in ("tiny", "0.6b"):
        chosen["slices"] = in_slices()
    return chosen


@contextmanager
def without_kernel() -> Iterator[None]:
    """rlpost's attention as it is where torch's kernel for several lengths is not available."""
    from rlpost.train import attention

    with patch.object(attention, "_has_kernel", lambda query: False):
        yield


@contextmanager
def in_slices() -> Iterator[None]:
    """In place of rlpost's attention, under its name, which is what the model looks up."""
    from transformers import AttentionInterface

    from rlpost.train import attention

    AttentionInterface.register(attention.NAME, sliced_attention)
    try:
        yield
    finally:
        attention.register()


def sliced_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, packed_lengths: list[int], scaling: Any, **unused: Any
) -> tuple[Any, None]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts, start = [], 0
    for length in packed_lengths:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        start += length
    return torch.cat(parts, dim=2).transpose(1, 2), None


def backward_s(module: Any, lengths: list[int], vocab_size: int) -> float:
    """Seconds of a forward and backward pass of one row; leaves the gradients."""
    import torch

    from rlpost.train.forward import trainable_positions

    batch = packed_batch([lengths], vocab_size)
    (row,) = batch.rows
    device = next(module.parameters()).device
    arrays = (row.token_ids, row.position_ids, trainable_positions(row))
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    module.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    logprobs, entropy = module(*tensors, 1.0, lengths).unbind(0)
    negative_logprob(logprobs, entropy, row, batch)[0].backward()
    synchronize()
    return time.perf_counter() - start


def row_flop(policy: Policy, lengths: list[int]) -> float:
    """Six for each weight and token, and causal attention forward and backward; what checkpointing repeats is extra
    work and not counted. The head sees the trained half only; that is left out, as usual."""
    shape = shape_of(policy.size)
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = sum(6 * shape["num_hidden_layers"] * width * length**2 for length in lengths)
    return float(6 * policy.num_params * sum(lengths) + attention)


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    apart = sum(float((a[name].float() - b[name].float()).square().sum()) for name in b)
    norm = sum(float(b[name].float().square().sum()) for name in b)
    return float((apart / norm) ** 0.5)


# ---- a whole update with its optimizer step


def measure_step(record: Record, policy: Policy, rows: dict[str, list[int]]) -> None:
    import torch

    trainer = build_random_trainer(policy)
    on_gpu = torch.cuda.is_available()
    batch = packed_batch(list(rows.values())[:2], policy.vocab_size)
    for name in ("first_update_s", "update_s"):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with record.timed(name):
            assert trainer.update(batch, negative_logprob).applied, "the optimizer step was dropped"
            synchronize()
    record.note(update_tokens=sum(len(row.token_ids) for row in batch.rows), zero_stage=policy.cfg.train.zero_stage)
    if on_gpu:
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        record.note(peak_bytes_per_param=peak / policy.num_params, held_bytes_per_param=held / policy.num_params)
