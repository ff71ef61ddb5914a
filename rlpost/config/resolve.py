"""The configuration with everything written out that depends on the device, once and for every part of a run.

Pure functions: ``workers.runtime`` decides the device and the number of threads. ``session`` resolves a run's
configuration, ``sft`` its own, and ``preflight`` plans with one resolved for a device that may not be present.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from rlpost.config.schema import Config

T = TypeVar("T")

DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # bfloat16 is several times slower than float32 on a CPU
# Tokens per packed row. CPU: 1,024 and 2,048 were fastest for the demo's model; 256 took 1.17x, 4,096 1.2x as long.
ROW_TOKENS = {"cpu": 1024, "cuda": 16384}
MAX_SLOTS = {"cpu": 64, "cuda": 256}  # a GPU decodes 256 samples in little more time than 64
CANARY_THRESHOLD = {"float32": 1e-4, "bfloat16": 0.1}  # mean, nats; measured: docs/training.md
# Keys that :func:`resolve` writes out if they are null or "auto".
WRITTEN_OUT = (
    "device",
    "threads",
    "canary_threshold",
    "model.dtype",
    "engine.max_slots",
    "engine.enforce_eager",
    "engine.sleep",
    "train.zero_stage",
    "train.grad_accum_dtype",
    "train.max_row_tokens",
    "eval.max_response_tokens",
    "cluster.cpus_per_worker",
)


def resolve(cfg: Config, *, device: str, threads: int) -> Config:
    """``cfg`` for ``device`` ("cpu" or "cuda"); values set by the user are kept. Resolving twice changes nothing."""
    dtype = cfg.model.dtype if cfg.model.dtype != "auto" else DTYPE[device]
    stage = _given(cfg.train.zero_stage, 1 if (device, dtype) == ("cpu", "float32") else 2)
    train, engine, evaluation, cluster = cfg.train, cfg.engine, cfg.eval, cfg.cluster
    return replace(
        cfg,
        device=device,
        threads=threads,
        canary_threshold=_given(cfg.canary_threshold, CANARY_THRESHOLD[dtype]),
        model=replace(cfg.model, dtype=dtype),
        engine=replace(
            engine,
            max_slots=choose_slots(cfg, device),
            enforce_eager=_given(engine.enforce_eager, device == "cpu"),
            # On a GPU its memory decides (``preflight.device_plan``).
            sleep="always" if (device, engine.sleep) == ("cpu", "auto") else engine.sleep,
        ),
        train=replace(
            train,
            zero_stage=stage,
            grad_accum_dtype=sum_dtype(train.grad_accum_dtype, dtype=dtype, zero_stage=stage),
            max_row_tokens=_given(train.max_row_tokens, ROW_TOKENS[device]),
        ),
        eval=replace(
            evaluation,
            max_response_tokens=_given(evaluation.max_response_tokens, cfg.rollout.max_response_tokens),
        ),
        cluster=replace(cluster, cpus_per_worker=_given(cluster.cpus_per_worker, threads)),
    )


def choose_slots(cfg: Config, device: str) -> int:
    """Samples that each engine decodes at once."""
    wanted = -(-(cfg.rollout.max_in_flight or 0) // cfg.num_engines)
    return _given(cfg.engine.max_slots, max(MAX_SLOTS[device], wanted))


def sum_dtype(wanted: str, *, dtype: str, zero_stage: int) -> str:
    """In which type gradients are summed, ``wanted`` or what suits the model's ``dtype``. At stage 1 DeepSpeed sums in
    the model's own: for bfloat16 and float32 it has another optimizer there, whose states cannot leave a GPU."""
    return wanted if wanted != "auto" else (dtype if zero_stage == 1 else "float32")


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
