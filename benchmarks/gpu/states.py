"""Checksums of what ZeRO trains with, to see that no bit changes on a way there and back."""

from __future__ import annotations

from typing import Any

MOMENTS = ("exp_avg", "exp_avg_sq")
PART_NUMBERS = 1 << 26  # at a time: a sum takes 64-bit copies of them


def state_sums(trainer: Any) -> dict[str, list[tuple[int, int]]]:
    """Of all that this rank holds: the model's weights (its shards at stage 3), master weights and both moments."""
    zero = trainer.engine.optimizer
    tensors = {name: getattr(p, "ds_tensor", p).detach() for name, p in trainer.lm.named_parameters()}
    sharded = trainer.engine.zero_optimization_stage() == 3
    masters = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    tensors |= {f"master {number}": master for number, master in enumerate(masters)}
    for number, state in enumerate(zero.optimizer.state.values()):
        tensors |= {f"{moment} {number}": state[moment] for moment in MOMENTS}
    assert any(name.startswith(MOMENTS) for name in tensors), "no optimizer step was taken"
    return {name: bit_sum(tensor) for name, tensor in tensors.items()}


def bit_sum(tensor: Any) -> list[tuple[int, int]]:
    """Of the storage's bits, part by part: their sum, and one weighted by place, so that words that change or change
    places show. Sums wrap around at 64 bits."""
    import torch

    words = tensor.contiguous().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    sums = []
    for part in words.split(PART_NUMBERS):
        wide = part.to(torch.int64)
        places = torch.arange(1, len(part) + 1, device=part.device)
        sums.append((int(wide.sum()), int((wide * places).sum())))
    return sums
