"""Start-up and shutdown of one worker: the only place that writes the environment, and the only order that works.

Order: environment -> process group and DeepSpeed -> on a GPU the trainer's states off the device -> engine -> first
publication. vLLM before DeepSpeed would leave DeepSpeed with a world of one and no gradient sync, and vLLM refuses to
start when free memory is below its budget. Shutdown reverses it: the engine's shutdown destroys its process's groups.
Called by ``session``, ``loop`` and ``sft``; importing this module changes nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.config import Config
from rlpost.errors import ConfigError, explain

if TYPE_CHECKING:
    from rlpost.rollout.engine import Engine
    from rlpost.train.policy import PolicyTrainer

SMALL_MODEL_PARAMS = 20_000_000  # below this a second OpenMP thread costs more than it gives (measured on 2 cores)
SMALL_VOCABULARY = 32_768  # below this vLLM's CPU sampler needs no compiled kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What the machine offers and what was chosen of it."""

    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16"
    threads: int


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; needs no torch."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def choose_runtime(cfg: Config, *, num_params: int) -> Runtime:
    """Resolve ``auto``: device, dtype and CPU threads.

    Raises:
        ConfigError: a GPU was asked for where there is none.
    """
    device = cfg.device if cfg.device != "auto" else ("cuda" if has_gpu() else "cpu")
    if device == "cuda" and not has_gpu():
        raise ConfigError(explain("device", "cuda", "an NVIDIA GPU with its driver", "use device=cpu or device=auto"))
    cores = len(os.sched_getaffinity(0))
    threads = cfg.threads or (1 if device == "cpu" and num_params < SMALL_MODEL_PARAMS else max(1, cores))
    return Runtime(device=device, dtype=cfg.model.dtype_on(device), threads=threads)


def write_environment(runtime: Runtime, *, vocab_size: int) -> None:
    """Everything the libraries read from the environment; before the first heavy import of the process."""
    environment = {
        "OMP_NUM_THREADS": str(runtime.threads),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",  # DeepSpeed needs it even alone
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if runtime.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if vocab_size < SMALL_VOCABULARY:
            environment["TORCHDYNAMO_DISABLE"] = "1"  # spares a compilation of seconds at the first step
    os.environ.update(environment)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in GiB, and it would override engine.kv_cache_bytes
    for category in (FutureWarning, UserWarning):  # of libraries, about libraries: nothing a user of ours can mend
        warnings.filterwarnings("ignore", category=category, module="torch|deepspeed|vllm|transformers")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available": it is not needed


@dataclass(kw_only=True)
class Worker:
    """One device's trainer and engine, which share it by turns."""

    engine: Engine
    trainer: PolicyTrainer

    def close(self) -> None:
        self.trainer.close()
        self.engine.shutdown()


def start_worker(
    cfg: Config, runtime: Runtime, *, model_folder: str, needs_reference: bool, max_model_len: int
) -> Worker:
    """Start the trainer, put it to sleep, start the engine. The engine's weights are not the trainer's yet."""
    from rlpost.train.deepspeed_trainer import build_trainer

    steps = cfg.steps * cfg.train.epochs * cfg.train.optimizer_steps_per_rollout
    trainer = build_trainer(
        cfg,
        model_folder=model_folder,
        device=runtime.device,
        total_optimizer_steps=steps,
        needs_reference=needs_reference,
    )
    trainer.sleep()
    from rlpost.rollout.vllm_engine import build_engine

    engine = build_engine(cfg, model_folder=model_folder, device=runtime.device, max_model_len=max_model_len)
    return Worker(engine=engine, trainer=trainer)
