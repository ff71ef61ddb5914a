"""One worker's process: an engine and a trainer rank that share a device, as methods that a controller calls remotely.

Builds the same parts as a run on one device (``workers.local.start_worker``) and owns what is specific to being remote:
the phase and its progress, the order to halt, and the trainer's state kept outside the process. Calls are made one at a
time, except :meth:`ping` and :meth:`halt`, which are handled while another one runs. Ray is not imported here;
``workers.cluster.actors`` makes an actor of this class.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlpost.engine.lockstep import LockstepEngine
from rlpost.engine.replicas import Exchange, ReplicaLoop, Report
from rlpost.train.protocol import Objective, UpdateResult
from rlpost.types import PackedRow, TrainBatch
from rlpost.workers.cluster import files
from rlpost.workers.cluster.shards import KeptShards, clear_attempts
from rlpost.workers.engine_map import EngineMap
from rlpost.workers.local import Worker, start_worker
from rlpost.workers.protocol import WorkerSettings
from rlpost.workers.publication import Publication
from rlpost.workers.runtime import write_environment
from rlpost.workers.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """Identifies a worker; for messages, and for signals that must reach it."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a worker reports when pinged."""

    phase: str
    silent_s: float  # since the phase last made progress; 0 while the worker has nothing to do


class ClusterWorker:
    """See the module docstring.

    Args:
        rank: of the trainer; the worker's number.
        settings: what every worker of the run is built from.
        kept: where this rank keeps its state outside the process.
        log: file for this process's output, if its folder is visible from here.
    """

    def __init__(self, rank: int, settings: WorkerSettings, kept: KeptShards, log: Path) -> None:
        cfg = settings.cfg
        if log.parent.is_dir():
            _print_to(log)
        self.rank, self.world, self._settings, self._kept = rank, cfg.cluster.num_workers, settings, kept
        self._halted = self._stopped = 0  # numbers of the last order to halt, and of the last stop carried out
        self._watchdog = Watchdog(cfg.watchdog_s)
        self._watchdog.rest()
        self._store: Any = None
        self._worker: Worker
        self._replica: ReplicaLoop
        self._lockstep: LockstepEngine | None = None  # if an engine spans workers
        assert cfg.threads is not None, "resolved"
        write_environment(
            device=cfg.device,
            dtype=cfg.model.dtype,
            threads=cfg.threads,
            vocab_size=settings.vocab_size,
            rank=rank,
            world=self.world,
        )

    # ---- start and end --------------------------------------------------------------------------------------

    def info(self) -> WorkerInfo:
        return WorkerInfo(rank=self.rank, host=socket.gethostname(), pid=os.getpid())

    def open_store(self, host: str) -> int:
        """Open the store where all ranks meet, on a free port of this machine; returns the port."""
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=self._settings.cfg.cluster.start_timeout_s)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return int(self._store.port)

    def start(self, host: str, port: int) -> None:
        """Start trainer and engine; returns when all ranks have joined."""
        with self._phase("start"):
            from torch.distributed import TCPStore

            cluster = self._settings.cfg.cluster
            timeout = timedelta(seconds=cluster.start_timeout_s)
            store = self._store or TCPStore(host, port, is_master=False, timeout=timeout)
            self._worker = start_worker(self._settings, rank=self.rank, world=self.world, store=store)
            if not self._settings.with_engine:
                return
            engine = self._worker.engine
            self._lockstep = engine if isinstance(engine, LockstepEngine) else None
            replica = EngineMap.of(self._settings.cfg).engine_of(self.rank)
            self._replica = ReplicaLoop(engine, replica=replica, exchange_s=cluster.exchange_s, halted=self._is_halted)

    def close(self) -> None:
        with self._phase("close"):
            self._worker.close()
            self._watchdog.close()

    # ---- heartbeats, handled at any time --------------------------------------------------------------------

    def ping(self) -> Heartbeat:
        return Heartbeat(phase=self._watchdog.phase, silent_s=self._watchdog.silent_s)

    def halt(self, number: int) -> None:
        """End the running exchange and the waiting ones at once: the :meth:`stop` of this number follows.

        It may arrive after that stop, since the calls run concurrently; then there is nothing to end.
        """
        self._halted = max(self._halted, number)

    # ---- generation -----------------------------------------------------------------------------------------

    def exchange(self, exchange: Exchange) -> Report:
        with self._phase("generate"), self._leading():
            return self._replica.run(exchange)

    def stop(self, number: int) -> Report:
        with self._phase("stop"), self._leading():
            report = self._replica.stop()
            self._stopped = number
            return report

    def follow(self) -> None:
        """Do what the leader of this worker's engine does in one exchange, or in one stop."""
        assert self._lockstep is not None, "this worker's engine has no other members"
        with self._phase("generate"):
            self._lockstep.follow(self._watchdog.beat)

    # ---- sharing the device ---------------------------------------------------------------------------------

    def begin_training(self) -> None:
        with self._phase("update"), self._worker.device.training():
            pass  # the trainer keeps the device until the next publication

    def publish(self, policy_version: int) -> Publication:
        with self._phase("publish"):
            return self._worker.device.publish_weights(policy_version)

    # ---- the trainer's rank ---------------------------------------------------------------------------------

    def update(self, batch: TrainBatch, objective: Objective) -> UpdateResult:
        with self._phase("update"):
            return self._worker.trainer.update(batch, objective)

    def logprobs(self, rows: Sequence[PackedRow], reference: bool) -> list[Any]:
        with self._phase("update"):
            return self._worker.trainer.logprobs(rows, reference=reference)

    def save(self, folder: Path) -> None:
        with self._phase("save"):
            self._worker.trainer.save(folder)

    def load(self, folder: Path) -> None:
        with self._phase("load"):
            self._worker.trainer.load(folder)

    def export(self, folder: Path) -> None:
        with self._phase("save"):
            self._worker.trainer.export(folder)

    def save_config(self, folder: Path) -> None:
        with self._phase("save"):
            self._worker.trainer.save_config(folder)

    # ---- the trainer's state outside this process -----------------------------------------------------------

    def can_keep(self) -> bool:
        return self._kept.has_room(self._settings.num_params)

    def keep(self, step: int) -> None:
        with self._phase("keep"):
            self._kept.write(step, self._worker.trainer.save)

    def kept_folder(self, step: int) -> Path:
        return self._kept.folder(step)

    def kept_steps(self) -> list[int]:
        return self._kept.steps()

    def drop_kept(self, before_step: int) -> None:
        self._kept.drop_before(before_step)

    def clear_kept(self) -> None:
        self._kept.clear()

    def load_kept(self, step: int) -> None:
        with self._phase("load"):
            self._worker.trainer.load(self._kept.folder(step))

    # ---- files, if this machine shares no storage with the controller's ----------------------------------------

    def answer_probe(self, folder: Path, token: str) -> bool:
        return files.answer_probe(folder, token, self.rank)

    def list_files(self, folder: Path) -> dict[str, int]:
        return files.list_files(folder)

    def read_piece(self, file: Path, offset: int, size: int) -> bytes:
        return files.read_piece(file, offset, size)

    def write_piece(self, file: Path, offset: int, piece: bytes) -> None:
        files.write_piece(file, offset, piece)

    def clear_attempts(self, folder: Path) -> None:
        clear_attempts(folder)

    def remove_files(self, folder: Path) -> None:
        files.remove_files(folder)

    # ---- private --------------------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._watchdog.beat(name)
        yield
        self._watchdog.beat(f"waiting after {name}")
        self._watchdog.rest()

    @contextmanager
    def _leading(self) -> Iterator[None]:
        yield
        if self._lockstep is not None:
            self._lockstep.end()

    def _is_halted(self) -> bool:
        self._watchdog.beat()
        return self._halted > self._stopped


def _print_to(log: Path) -> None:
    """Redirect this process's standard output and error, including its libraries', to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
