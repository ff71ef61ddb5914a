"""What the machine offers a run, and the process environment: the only place that writes it.

``choose_device`` and ``choose_threads`` decide what the configuration leaves open; ``write_environment`` is called
before the first heavy import of a process. Called by ``session``, ``sft`` and each cluster worker; importing this
module changes nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path

from rlpost.config import Config
from rlpost.errors import ConfigError, explain

SMALL_MODEL_PARAMS = 20_000_000  # below this a second OpenMP thread costs more than it gains (measured on 2 cores)
SMALL_VOCABULARY = 32_768  # below this vLLM's CPU sampler needs no compiled kernel


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and CUDA_VISIBLE_DEVICES does not hide all GPUs; needs no torch."""
    return count_gpus() != 0 and _has_driver()


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def wanted_device(cfg: Config) -> str:
    """ "cpu" or "cuda": as set, or what this machine has. A GPU that is asked for need not be there."""
    return cfg.device if cfg.device != "auto" else ("cuda" if has_gpu() else "cpu")


def choose_device(cfg: Config) -> str:
    """ "cpu" or "cuda". Raises ConfigError if a GPU was requested and there is none."""
    device = wanted_device(cfg)
    if device == "cuda" and not has_gpu():
        hidden = _has_driver() and "CUDA_VISIBLE_DEVICES" in os.environ
        do = "CUDA_VISIBLE_DEVICES hides all: unset it" if hidden else "use device=cpu or device=auto"
        raise ConfigError(explain("device", "cuda", "an NVIDIA GPU with its driver", do))
    return device


def require_usable(device: str) -> None:
    """Raises ConfigError if torch cannot use the GPU whose driver is there: a driver that is too old, a container that
    was not given the GPU, a torch for CPUs. Imports torch, so call it after :func:`write_environment`."""
    if device != "cuda":
        return
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason, do = "this torch is built for CPUs", "make clean, make install DEVICE=gpu, or use device=cpu"
    else:
        reason, do = "no GPU that it can use", "compare `nvidia-smi` with docs/gpu.md, or use device=cpu"
        try:
            torch.cuda.init()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    raise ConfigError(explain("device", f"cuda, but for torch: {reason}", "a GPU that torch can use", do))


def count_gpus() -> int | None:
    """NVIDIA GPUs that a process here may use; needs no torch. None: it cannot be known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((n for n, name in enumerate(names) if name in ("", "-1")), len(names))
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def require_gpus(wanted: int) -> None:
    """Raises ConfigError if this machine has fewer; a Ray of our own would hand out GPUs that are not there."""
    have = count_gpus()
    if have is not None and have < wanted:
        got = f"{wanted} workers with a GPU each"
        do = "lower it, or start Ray on more machines and set cluster.address"
        raise ConfigError(explain("cluster.num_workers", got, f"at most {have}, the GPUs here", do))


def choose_threads(cfg: Config, device: str, *, num_params: int) -> int:
    """CPU threads per worker: as set, else one where a second gains nothing, else the worker's share of the cores.

    It gains nothing for a small model on a CPU, and beside a GPU unless the optimizer's states stay in host memory.
    """
    computes = num_params >= SMALL_MODEL_PARAMS if device == "cpu" else cfg.train.offload_optimizer
    cores = len(os.sched_getaffinity(0)) // cfg.cluster.num_workers
    return cfg.threads or (max(1, cores) if computes else 1)


def write_environment(*, device: str, dtype: str, threads: int, vocab_size: int, rank: int = 0, world: int = 1) -> None:
    """Set everything the libraries read from the environment; call it before the process's first heavy import."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # DeepSpeed needs it even for one process; a worker sees one device only
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # for a private Ray's workers; its default of 15 yields to everything else
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # the peers of a lost worker raise errors, as they must
    }
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if vocab_size < SMALL_VOCABULARY:
            environment["TORCHDYNAMO_DISABLE"] = "1"  # saves seconds of compilation at the first step
    elif dtype == "float32":
        # vLLM's attention is Triton's there, which would multiply as TF32: a hundred times the error of float32.
        environment["TRITON_F32_DEFAULT"] = "ieee"
    os.environ.update(environment)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in GiB, and it would override engine.kv_cache_bytes
    for category in (FutureWarning, UserWarning):  # from libraries, about libraries: nothing that our users can fix
        warnings.filterwarnings("ignore", category=category, module="torch|deepspeed|vllm|transformers")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available": it is not needed
