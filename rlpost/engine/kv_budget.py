"""How much memory the engine's KV cache gets. No vLLM here: ``session`` needs this before an engine exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlpost.errors import RunError, explain
from rlpost.models.shape import kv_bytes

_KV_BLOCK_TOKENS = 128  # vLLM's block on a CPU; a multiple of the GPU's 16
_MAX_KV_SHARE = 0.5  # of the memory that is free when the engine starts, unless kv_cache_bytes is set


def kv_bytes_needed(
    shape: Mapping[str, Any], *, max_slots: int, max_model_len: int, dtype: str, tensor_parallel: int = 1
) -> int:
    """Bytes on each device so that ``max_slots`` sequences of ``max_model_len`` tokens, in whole blocks, never preempt
    each other."""
    blocks = -(-max_model_len // _KV_BLOCK_TOKENS)
    num_tokens = (max_slots * blocks + 1) * _KV_BLOCK_TOKENS  # vLLM keeps one block for itself
    return kv_bytes(shape, num_tokens=num_tokens, dtype=dtype, tensor_parallel=tensor_parallel)


def bounded_kv_bytes(needed: int, one_sequence: int, free: int) -> int:
    """``needed``, but at most half the free memory; raises RunError if that does not hold a single sequence."""
    limit = int(free * _MAX_KV_SHARE)
    if limit < one_sequence:
        raise RunError(
            explain(
                "memory for the KV cache",
                f"{limit} bytes (half of the free memory)",
                f"at least {one_sequence}, for one sequence of full length",
                "lower model.max_context_tokens, free memory, or set engine.kv_cache_bytes",
            )
        )
    return min(needed, limit)


def require_one_sequence(
    given: int, shape: Mapping[str, Any], *, max_model_len: int, dtype: str, tensor_parallel: int = 1
) -> None:
    """Raises RunError if the KV cache does not hold one sequence of ``max_model_len`` tokens; vLLM needs one."""
    needed = kv_bytes_needed(
        shape, max_slots=1, max_model_len=max_model_len, dtype=dtype, tensor_parallel=tensor_parallel
    )
    if given < needed:
        do = "raise it, leave it unset, or lower rollout.max_response_tokens"
        raise RunError(explain("engine.kv_cache_bytes", given, f">= {needed}, one sequence of {max_model_len}", do))


def free_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info()[0])


def free_share_of_gpu() -> float:
    import torch

    free, total = torch.cuda.mem_get_info()
    return 0.9 * free / total
