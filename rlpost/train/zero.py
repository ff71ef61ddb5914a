"""DeepSpeed's configuration: the only place that knows its keys. Called by ``train.deepspeed_trainer``."""

from __future__ import annotations

from typing import Any

import torch

from rlpost.config import TrainConfig

_SHORT = {"auto": None, "float32": "fp32", "bfloat16": "bf16"}  # DeepSpeed's names; None: the model's type


def zero_config(train: TrainConfig, *, dtype: torch.dtype, num_params: int) -> dict[str, Any]:
    """DeepSpeed's configuration. ``backward`` is called once per row and ``step`` when the caller says so."""
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        # The default bucket (5e8 numbers) is a buffer allocated whatever the model's size.
        "reduce_bucket_size": min(500_000_000, max(num_params, 1024)),
        "allgather_bucket_size": min(500_000_000, max(num_params, 1024)),
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": float(train.grad_clip),  # always: DeepSpeed's default is 1.0, not off
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": _SHORT[train.grad_accum_dtype]},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # train.optimizer may be a user's own
        # Torch's fused AdamW is as fast on a CPU as DeepSpeed's own, which takes minutes to compile.
        "zero_force_ds_cpu_optimizer": False,
    }
