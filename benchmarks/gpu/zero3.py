"""Stage 8: ZeRO-3's states go to host memory and come back, and through a checkpoint, with the same bits.

With torch's AdamW, whose states rlpost moves itself, and with DeepSpeed's FusedAdam, which DeepSpeed moves.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.colocation import negative_logprob
from benchmarks.gpu.random_policy import (
    build_random_trainer,
    packed_batch,
    prepare,
    synchronize,
    used_gb,
)
from benchmarks.gpu.record import Record, Settings
from benchmarks.gpu.states import state_sums


def run(settings: Settings, record: Record, optimizer: str) -> None:
    if optimizer == "fused" and not settings.on_gpu:
        record.skip("FusedAdam needs a GPU")
    size, length = ("tiny", 64) if settings.small else ("0.6b", 1024)
    record.note(size=size)
    with TemporaryDirectory() as folder:
        policy = prepare(
            settings,
            size,
            Path(folder) / "model",
            train={
                "zero_stage": 3,
                "lr": 1e-3,
                "gradient_checkpointing": not settings.small,
                "optimizer": {"_target_": f"benchmarks.gpu.zero3.{optimizer}"},
            },
        )
        trainer = build_random_trainer(policy)
        batch = packed_batch([[length] * 2], policy.vocab_size)
        record.note(optimizer=type(trainer.engine.optimizer.optimizer).__name__)
        for _ in range(2):  # both moments hold something after the first
            assert trainer.update(batch, negative_logprob).applied, "the optimizer step was dropped"
        synchronize()
        sleep_and_wake(record, trainer)
        save_and_load(record, trainer, batch, Path(folder) / "checkpoint")


def sleep_and_wake(record: Record, trainer: Any) -> None:
    before, used = state_sums(trainer), used_gb()
    with record.timed("offload_s"):
        trainer.sleep()
        synchronize()
    record.note(offloaded_gb=used - used_gb())
    with record.timed("reload_s"):
        trainer.wake()
        synchronize()
    record.require(state_sums(trainer) == before, "other bits after a sleep")


def save_and_load(record: Record, trainer: Any, batch: Any, folder: Path) -> None:
    before = state_sums(trainer)
    with record.timed("save_s"):
        trainer.save(folder)
    assert trainer.update(batch, negative_logprob).applied, "the optimizer step was dropped"
    record.require(state_sums(trainer) != before, "an update changed nothing: the comparison could not fail")
    with record.timed("load_s"):
        trainer.load(folder)
    record.require(state_sums(trainer) == before, "other bits after a checkpoint was loaded")


def adamw(module: Any, *, train: Any, device: str, ranks: Any) -> Any:
    import torch

    return torch.optim.AdamW(module.parameters(), lr=train.lr, fused=True)


def fused(module: Any, *, train: Any, device: str, ranks: Any) -> Any:
    """Compiled with nvcc on first use."""
    return importlib.import_module("deepspeed.ops.adam").FusedAdam(module.parameters(), lr=train.lr, adam_w_mode=True)
