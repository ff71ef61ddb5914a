"""Memory of the trainer's steps, measured, beside what ``rlpost check`` plans: real DeepSpeed, one rank, on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.trainer_memory [--stages 1 2 3] [--hidden H] [--layers L] [--offload]

A fresh process for each case builds the trainer of a random Qwen3 model and takes three optimizer steps of two short
rows each. Measured is the process's peak resident memory (VmHWM, which the kernel resets on request) while the rows
run forward and backward, and while the optimizer steps, less what it held before: after a small trainer was built and
used, so that libraries have loaded and allocated their own. Planned is ``preflight.memory_plan`` for a CPU without the
engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.resolve import resolve

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 12288,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
ROW_TOKENS = 24
PHASES = ("backward", "optimizer step")
# glibc gives each large block back when it is freed, whatever was freed before; one arena, so that none hoards.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def configure(*, stage: int, dtype: str, sums: str = "auto", offload: bool = False) -> Config:
    cfg = Config()
    cfg.model.dtype, cfg.train.zero_stage, cfg.train.grad_accum_dtype = dtype, stage, sums
    cfg.train.offload_optimizer = offload
    cfg.train.max_row_tokens = cfg.train.logprob_chunk_tokens = ROW_TOKENS
    return resolve(cfg, device="cpu", threads=1)


def planned(cfg: Config, shape: Mapping[str, Any]) -> dict[str, int]:
    """Bytes, by phase."""
    from rlpost.preflight.memory_plan import plan_memory

    plan = plan_memory(
        shape,
        dtype=cfg.model.dtype,
        device="cpu",
        zero_stage=cfg.train.zero_stage,
        grad_accum_dtype=cfg.train.grad_accum_dtype,
        world_size=1,
        offload_optimizer=cfg.train.offload_optimizer,
        offload_params=False,
        sleep_offload=True,
        gradient_checkpointing=False,
        reference=False,
        keep_kv=False,
        kv_cache_bytes=0,
        row_tokens=ROW_TOKENS,
        chunk_tokens=ROW_TOKENS,
    )
    assert plan is not None
    items = [item for item in plan.items if item.name not in ("engine weights", "KV cache")]
    return {
        "backward": sum(item.num_bytes for item in items if item.in_backward),
        "optimizer step": sum(item.num_bytes for item in items if item.in_step),
    }


def measure(cfg: Config, shape: Mapping[str, Any]) -> dict[str, int]:
    """Bytes, by phase, of this process, which must be fresh. Raises OSError where the kernel does not reset peaks."""
    small = {**shape, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    used = build(cfg, small)
    run(used, int(small["vocab_size"]))
    used.close()
    del used
    release()
    before = peak_bytes()
    trainer = build(cfg, shape)
    return {phase: most - before for phase, most in run(trainer, int(shape["vocab_size"])).items()}


def build(cfg: Config, shape: Mapping[str, Any]) -> Any:
    from rlpost.train.deepspeed_trainer import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        return build_trainer(cfg, model_folder=folder, total_optimizer_steps=10, needs_reference=False, init="random")


def run(trainer: Any, vocabulary: int, steps: int = 3) -> dict[str, int]:
    """The process's peak in each phase of the last of a few optimizer steps."""
    import numpy as np

    from rlpost.types import PackedRow, TrainBatch

    peaks = {}
    step = trainer._optimizer_step

    def watched_step(lr: float) -> Any:
        peaks["backward"] = peak_bytes()
        release()
        result = step(lr)
        peaks["optimizer step"] = peak_bytes()
        return result

    def objective(logprobs: Any, entropy: Any, row: PackedRow, batch: TrainBatch) -> tuple[Any, dict[str, Any]]:
        return logprobs.sum() / batch.num_tokens, {}

    trainer._optimizer_step = watched_step
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = [
            PackedRow(
                token_ids=random.integers(0, vocabulary, ROW_TOKENS),
                position_ids=np.arange(ROW_TOKENS),
                sequence_ids=np.zeros(ROW_TOKENS, np.int64),
                loss_mask=np.ones(ROW_TOKENS, np.bool_),
                rollout_logprobs=np.zeros(ROW_TOKENS, np.float32),
                policy_versions=np.zeros(ROW_TOKENS, np.int32),
                advantages=np.ones(ROW_TOKENS, np.float32),
            )
            for _ in range(3)
        ]
        count = 3 * ROW_TOKENS
        release()
        batch = TrainBatch(
            rows=tuple(rows),
            num_tokens=count,
            num_sequences=3,
            sequence_lengths=np.full(3, ROW_TOKENS),
            policy_version=0,
        )
        assert trainer.update(batch, objective).applied
    trainer._optimizer_step = step
    return peaks


def release() -> None:
    """Free memory goes back to the kernel, and the peak starts again from what is held."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_apart(case: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, int]:
    """:func:`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.trainer_memory", "--case", json.dumps([case, shape])]
    output = subprocess.run(command, env={**os.environ, **ALLOCATOR}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--offload", action="store_true", help="with train.offload_optimizer")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        from rlpost.workers.runtime import write_environment

        case, shape = json.loads(arguments.case)
        write_environment(device="cpu", dtype=case["dtype"], threads=1, vocab_size=64)
        print(json.dumps(measure(configure(**case), shape)), flush=True)
        os._exit(0)  # DeepSpeed's own end has nothing to add
    shape = {**SHAPE, "hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers}
    from rlpost.models.shape import count_params

    parameters = count_params(shape)
    print(f"{parameters:,} parameters, rows of {ROW_TOKENS} tokens; bytes a parameter, measured / planned")
    for stage in arguments.stages:
        for dtype, sums in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
            if stage == 1 and dtype != sums:
                continue
            case = {"stage": stage, "dtype": dtype, "sums": sums, "offload": arguments.offload}
            plan, real = planned(configure(**case), shape), measure_apart(case, shape)
            columns = ", ".join(
                f"{phase} {real[phase] / parameters:.2f} / {plan[phase] / parameters:.2f}" for phase in PHASES
            )
            ratio = max(real.values()) / max(plan.values())
            print(f"stage {stage}, {dtype}, sums in {sums}: {columns}; peak {ratio:.2f} of the plan", flush=True)


if __name__ == "__main__":
    main()
