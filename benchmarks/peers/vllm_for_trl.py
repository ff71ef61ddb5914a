"""What TRL's colocated vLLM needs on a CPU, put in from outside: neither package is edited.

:func:`patch` is called once, after the environment is written and before the trainer is made. ``train_trl`` calls it.
"""

from __future__ import annotations

import functools
from typing import Any


def patch(*, unpack: bool = True, **engine_arguments: Any) -> None:
    """Makes ``GRPOTrainer(use_vllm=True)`` run here, its engine with ``engine_arguments`` beside TRL's own.

    ``unpack``: vLLM packs linear weights for oneDNN on a CPU and empties ``layer.weight``, so that TRL's
    ``load_weights`` raises AttributeError at the first publication. Unpacked they take new weights in place, as in
    ``rlpost.engine.vllm``.
    """
    import torch
    import trl.generation.vllm_generation as generation
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    if unpack:
        utils.dispatch_cpu_unquantized_gemm = plain
    make = generation.LLM

    @functools.wraps(make)
    def with_arguments(**given: Any) -> Any:
        return make(**given | engine_arguments)

    generation.LLM = with_arguments
