"""Start-up and shutdown of one worker, in the only order that works.

A worker is one device's trainer rank and engine. It lives in the controller's process, or, with ``cluster=ray``, in an
actor that calls the same functions (``workers.cluster.worker``).

Order: environment (``workers.runtime``) -> process group and DeepSpeed -> on a GPU the trainer's states off the device
-> engine -> first publication. vLLM before DeepSpeed would leave DeepSpeed with a world of one and no gradient sync,
and vLLM refuses to start when free memory is below its budget. Shutdown reverses it: the engine's shutdown destroys its
process's groups. Called by ``run``, for ``sft`` as well, and by ``workers.cluster.worker``; importing this
module changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rlpost.workers.canary import CanarySequence, sample_canary
from rlpost.workers.colocation import SharedDevice
from rlpost.workers.engine_map import EngineMap
from rlpost.workers.protocol import WorkerSettings

if TYPE_CHECKING:
    from rlpost.engine.protocol import DeviceEngine
    from rlpost.train.protocol import ColocatedTrainer


@dataclass(kw_only=True)
class Worker:
    """One device's trainer and engine, which share it by turns."""

    engine: DeviceEngine
    trainer: ColocatedTrainer
    device: SharedDevice

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


class NoEngine:
    """In place of the engine of a worker that only trains."""

    max_slots = 0

    def shutdown(self) -> None:
        pass


class TrainerAlone:
    """In place of the turns on a device that nobody shares."""

    @contextmanager
    def training(self) -> Iterator[None]:
        yield


def start_worker(settings: WorkerSettings, *, rank: int = 0, world: int = 1, store: Any = None) -> Worker:
    """Start the trainer, put it to sleep, start the engine. The engine's weights are not the trainer's yet.

    Without an engine (``with_engine``) the trainer has the device from beginning to end. With several ranks each calls
    this in its own process, with a ``store`` they share.
    """
    from rlpost.train.deepspeed_trainer import build_trainer

    cfg = settings.cfg
    trainer = build_trainer(
        cfg,
        model_folder=settings.model_folder,
        total_optimizer_steps=cfg.steps * cfg.train.epochs * cfg.train.optimizer_steps_per_rollout,
        needs_reference=settings.needs_reference,
        rank=rank,
        world=world,
        store=store,
        init=settings.init,
    )
    if not settings.with_engine:
        return Worker(
            engine=cast("DeviceEngine", NoEngine()), trainer=trainer, device=cast(SharedDevice, TrainerAlone())
        )
    trainer.sleep()
    engine, canary = _start_engine(settings, rank)
    assert cfg.canary_threshold is not None, "resolved"
    device = SharedDevice(
        engine,
        trainer,
        canary=canary,
        threshold=cfg.canary_threshold,
        moves_memory=cfg.engine.sleep != "never",
    )
    return Worker(engine=engine, trainer=trainer, device=device)


def _start_engine(settings: WorkerSettings, rank: int) -> tuple[DeviceEngine, list[CanarySequence]]:
    """This worker's engine, or its member of one, and what it samples from the weights it starts with.

    All workers call it at the same time: the members of an engine sample together, each the same tokens.
    """
    from rlpost.engine.vllm import build_engine

    cfg = settings.cfg
    engine = build_engine(
        cfg,
        model_folder=settings.model_folder,
        max_model_len=settings.max_model_len,
        tensor_parallel=cfg.engine.tensor_parallel,
    )
    canary = sample_canary(engine, settings.canary_prompts, max_tokens=settings.max_model_len - 1)
    if cfg.engine.tensor_parallel == 1:
        return engine, canary
    from rlpost.engine.lockstep import LockstepEngine
    from rlpost.engine.tensor_parallel_group import form_groups

    member = LockstepEngine(engine, form_groups(EngineMap.of(cfg).groups, rank))
    engine.watch_batches(member.agree_on_batch)
    return member, canary
