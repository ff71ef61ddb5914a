"""Start-up and shutdown of one worker: the only place that writes the environment, and the only order that works.

A worker is one device's trainer rank and engine. It lives in the controller's process, or, with ``cluster=ray``, in an
actor that calls the same functions (``cluster.worker``).

Order: environment -> process group and DeepSpeed -> on a GPU the trainer's states off the device -> engine -> first
publication. vLLM before DeepSpeed would leave DeepSpeed with a world of one and no gradient sync, and vLLM refuses to
start when free memory is below its budget. Shutdown reverses it: the engine's shutdown destroys its process's groups.
Called by ``session``, ``loop``, ``sft`` and ``cluster.worker``; importing this module changes nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlpost.cluster.mapping import EngineMap
from rlpost.colocation import CANARY_THRESHOLD, Device, Turns
from rlpost.config import Config
from rlpost.errors import ConfigError, explain

if TYPE_CHECKING:
    from rlpost.rollout.engine import DeviceEngine, Engine
    from rlpost.train.policy import PolicyTrainer, RankTrainer

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
    cores = len(os.sched_getaffinity(0)) // cfg.cluster.num_workers
    threads = cfg.threads or (1 if device == "cpu" and num_params < SMALL_MODEL_PARAMS else max(1, cores))
    return Runtime(device=device, dtype=cfg.model.dtype_on(device), threads=threads)


def write_environment(runtime: Runtime, *, vocab_size: int, rank: int = 0, world: int = 1) -> None:
    """Everything the libraries read from the environment; before the first heavy import of the process."""
    environment = {
        "OMP_NUM_THREADS": str(runtime.threads),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # DeepSpeed needs it even alone; a worker sees one device only
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # of a private Ray's workers; its 15 lets anything else on the machine go first
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what the peers of a lost worker raise, as they must
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


class Workers(Protocol):
    """What the loop needs of its workers, be it the one in this process or a cluster of them."""

    @property
    def engine(self) -> Engine: ...

    @property
    def trainer(self) -> PolicyTrainer: ...

    @property
    def device(self) -> Turns: ...

    def losses(self) -> list[str]:
        """What happened to the workers that were lost since all of them were there."""

    def keep(self, step: int) -> None:
        """Leave the trainer's state after ``step`` steps where a worker's death does not take it."""

    def recover(self, step: int) -> None:
        """All workers anew, with that state; the engines' weights are not published.

        Raises ShardsLost where the state is gone, WorkerLost where a worker is lost again.
        """

    def describe(self) -> list[dict[str, Any]]:
        """Of each worker that is a process of its own: rank, host, pid, phase, silent_s (since it made progress)."""

    def close(self) -> None: ...


@dataclass(kw_only=True)
class Worker:
    """One device's trainer and engine, which share it by turns."""

    engine: DeviceEngine
    trainer: RankTrainer
    device: Device

    def losses(self) -> list[str]:
        return []  # it lives and dies with its process

    def keep(self, step: int) -> None:
        pass  # what outlives this process is the checkpoint

    def recover(self, step: int) -> None:
        raise AssertionError("a worker in this process cannot be lost")

    def describe(self) -> list[dict[str, Any]]:
        return []  # there is nobody but the run's own process

    def close(self) -> None:
        self.trainer.close()
        self.engine.shutdown()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What every worker of a run is built from, whichever process it lives in."""

    cfg: Config
    runtime: Runtime
    model_folder: str
    vocab_size: int
    num_params: int
    hidden_size: int
    needs_reference: bool
    max_model_len: int
    canary: Sequence[np.ndarray]  # sequences that trainer and engine score at each publication


def start_worker(settings: WorkerSettings, *, rank: int = 0, world: int = 1, store: Any = None) -> Worker:
    """Start the trainer, put it to sleep, start the engine. The engine's weights are not the trainer's yet.

    With several ranks each calls this in its own process, with a ``store`` they share.
    """
    from rlpost.train.deepspeed_trainer import build_trainer

    cfg, runtime = settings.cfg, settings.runtime
    trainer = build_trainer(
        cfg,
        model_folder=settings.model_folder,
        device=runtime.device,
        total_optimizer_steps=cfg.steps * cfg.train.epochs * cfg.train.optimizer_steps_per_rollout,
        needs_reference=settings.needs_reference,
        rank=rank,
        world=world,
        store=store,
    )
    trainer.sleep()
    engine = _start_engine(settings, rank)
    threshold = cfg.canary_threshold or CANARY_THRESHOLD[runtime.dtype]
    device = Device(engine, trainer, canary=settings.canary, threshold=threshold)
    return Worker(engine=engine, trainer=trainer, device=device)


def _start_engine(settings: WorkerSettings, rank: int) -> DeviceEngine:
    """This worker's engine, or its member of one; all workers call it at the same time."""
    from rlpost.rollout.vllm_engine import build_engine

    cfg = settings.cfg
    engine = build_engine(
        cfg,
        model_folder=settings.model_folder,
        device=settings.runtime.device,
        max_model_len=settings.max_model_len,
        tensor_parallel=cfg.engine.tensor_parallel,
    )
    if cfg.engine.tensor_parallel == 1:
        return engine
    from rlpost.rollout.lockstep import LockstepEngine
    from rlpost.rollout.member_group import form_groups

    member = LockstepEngine(engine, form_groups(EngineMap.of(cfg).groups, rank))
    engine.watch_batches(member.agree_on_batch)
    return member
