"""DeepSpeed's configuration and the optimizer it drives. Called by ``train.deepspeed_trainer``; the only place that
knows DeepSpeed's keys."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from rlpost.config import TrainConfig


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
        "zero_optimization": zero,
        # Torch's fused AdamW is as fast on a CPU as DeepSpeed's own, which takes minutes to compile.
        "zero_force_ds_cpu_optimizer": False,
    }


def build_optimizer(module: nn.Module, train: TrainConfig, device: str) -> torch.optim.Optimizer:
    """AdamW over all parameters. Torch's fused one, except where only DeepSpeed's lets its states sleep (stage 3)."""
    settings: dict[str, Any] = {
        "lr": train.lr,
        "betas": (train.betas[0], train.betas[1]),
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    if device != "cpu" and train.zero_stage == 3 and not train.offload_optimizer and _can_build_fused_adam():
        # importlib, because the type checker cannot see into DeepSpeed's ops.
        fused_adam = importlib.import_module("deepspeed.ops.adam").FusedAdam
        return fused_adam(module.parameters(), adam_w_mode=True, **settings)
    return torch.optim.AdamW(module.parameters(), fused=True, **settings)


def _can_build_fused_adam() -> bool:
    """FusedAdam is compiled with nvcc on first use, unless DeepSpeed was installed with it."""
    builder = importlib.import_module("deepspeed.ops.op_builder")
    if importlib.import_module("deepspeed.git_version_info").installed_ops.get("fused_adam", False):
        return True
    try:
        builder.builder.installed_cuda_version()
    except builder.builder.MissingCUDAException:
        return False
    return True
