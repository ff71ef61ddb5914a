"""Ray: the workers as actors, their placement, calls to all of them, signs of life, their end.

Owns every use of Ray, but for the actors that clean up (``workers.cluster.cleanup``).

An actor is a :class:`~rlpost.workers.cluster.worker.ClusterWorker` with one GPU, or some CPUs, in one placement group.
Nothing here knows what the calls mean. A worker that dies, or that gives no sign of life for ``cluster.hang_s`` and is
killed for it, is reported by the next call as ``errors.WorkerLost``; restarting is all or nothing, since a process
group is never formed again inside a process that had one.

Who waits for whom: calls wait for all workers' answers, and end early when one is lost. One thread asks every worker
for its pulse; it is what ends a wait for a worker that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlpost.config import ClusterConfig
from rlpost.errors import RunError, UserError, WorkerLost, explain
from rlpost.workers.cluster.cleanup import Cleaner, Guardians
from rlpost.workers.cluster.files import check_shared
from rlpost.workers.cluster.shards import KeptShards
from rlpost.workers.cluster.worker import ClusterWorker, Heartbeat, WorkerInfo
from rlpost.workers.engine_map import EngineMap, Placement, place
from rlpost.workers.protocol import WorkerSettings

_POLL_S = 0.5  # how long one wait for answers lasts before the caller's beat
_BLAME_S = 15.0  # after a rank's collective call failed: how long its peer's death may take to be known
_CONNECT_S = 10.0
_CLOSE_S = 20.0  # a worker that takes longer to end is killed
_PHASES = {  # of a worker's methods that are not called as their phase
    **dict.fromkeys(
        ("answer_probe", "clear_attempts", "info", "node", "address", "open_store", "clear_kept", "can_keep"), "start"
    ),
    **dict.fromkeys(("begin_training", "logprobs"), "update"),
    **dict.fromkeys(("drop_kept", "kept_steps"), "keep"),
    **dict.fromkeys(("export", "save_config"), "save"),
    **dict.fromkeys(("load_kept", "kept_folder"), "load"),
    **dict.fromkeys(("list_files", "read_piece", "write_piece", "remove_files"), "files"),
}


class _Actor(ClusterWorker):
    """A worker whose signs of life have threads of their own."""

    def __init__(self, rank: int, settings: WorkerSettings, shards: Path, log: Path) -> None:
        super().__init__(rank, settings, KeptShards(shards, rank, self.node()), log)

    @ray.method(concurrency_group="health")
    def ping(self) -> Heartbeat:  # type: ignore[override]
        return super().ping()

    @ray.method(concurrency_group="health")
    def halt(self, number: int) -> None:  # type: ignore[override]
        super().halt(number)

    @staticmethod
    def address() -> str:
        return str(ray.util.get_node_ip_address())

    @staticmethod
    def node() -> str:
        return str(ray.get_runtime_context().get_node_id())


class RayCluster:
    """The connection to Ray and the room for the workers. ``close()`` gives everything back."""

    def __init__(self, cfg: ClusterConfig, engines: EngineMap, *, cpus: int, gpus: int, sweep: Sequence[Path]) -> None:
        """cpus, gpus: of one worker. ``sweep``: folders removed with this process, however it ends.

        Raises RunError where Ray cannot be reached or has no room for the workers.
        """
        self.is_private = cfg.address is None
        self._temp = Path(tempfile.mkdtemp(prefix="rlpost-ray-")) if self.is_private else None
        self._cleaner = Cleaner(sweep, private=self._temp)
        self.cpus, self.gpus = cpus, gpus
        try:
            self._connect(cfg)
            self.group, self.placement = self._reserve(cfg, engines)
        except BaseException:
            self._disconnect()
            raise

    def _connect(self, cfg: ClusterConfig) -> None:
        if self.is_private:
            ray.init(
                address="local",
                num_cpus=self.cpus * cfg.num_workers,
                num_gpus=self.gpus * cfg.num_workers,
                include_dashboard=False,
                object_store_memory=cfg.object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._temp),
            )
            return
        try:
            host, _, port = str(cfg.address).rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            ray.init(address=cfg.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            do = "start it (`ray start --head`), or leave it unset for a private one"
            raise RunError(
                explain("cluster.address", f"{cfg.address} ({error})", "a running Ray cluster", do)
            ) from error

    def _reserve(self, cfg: ClusterConfig, engines: EngineMap) -> tuple[PlacementGroup, Placement]:
        bundle = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        placement = place(engines, bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        group = placement_group(placement.bundles, strategy="PACK")
        if not group.wait(cfg.start_timeout_s if not self.is_private else 60):
            have = {name: ray.cluster_resources().get(name, 0) for name in bundle}
            remove_placement_group(group)
            do = "lower cluster.num_workers or cluster.cpus_per_worker, or add machines"
            raise RunError(explain("cluster: room for the workers", have, f"{cfg.num_workers} times {bundle}", do))
        return group, placement

    def close(self) -> None:
        with contextlib.suppress(RayError):
            remove_placement_group(self.group)
        self._disconnect()

    def _disconnect(self) -> None:
        ray.shutdown()
        self._cleaner.sweep()


class Actors:
    """All workers of a run. Calls are made by one thread; a second one listens to their pulse."""

    def __init__(
        self,
        cluster: RayCluster,
        settings: WorkerSettings,
        *,
        shards: Path,
        scratch: Path,
        logs: Path,
        beat: Callable[[], None],
        actor: type[_Actor] = _Actor,
    ) -> None:
        """What every worker gets, and how it is watched.

        Args:
            cluster: where workers are started.
            settings: what they are built from.
            shards: folder for kept states, on each worker's machine.
            scratch: one for files on their way; what is swept with the run.
            logs: folder for workers' output.
            beat: called while waiting.
            actor: what a worker is an instance of.
        """
        self._actor, self._guardians = actor, Guardians([shards, scratch])
        self._cluster, self._settings, self._cfg = cluster, settings, settings.cfg.cluster
        self._shards, self._logs, self._beat = shards, logs, beat
        self.world = self._cfg.num_workers
        self.handles: list[Any] = []
        self.who: list[WorkerInfo] = []
        self.nodes: list[str] = []
        self._lost: dict[int, str] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self.doing = "start"  # what the workers were last told to do
        self._listening = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- life and death -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fresh processes for all ranks. Raises WorkerLost where one dies, RunError where they take too long."""
        self._lost, self._heartbeats, self.who, self.doing = {}, {}, [], "start"
        self._logs.mkdir(parents=True, exist_ok=True)
        remote: Any = ray.remote(concurrency_groups={"health": 2})(self._actor)  # type: ignore[call-overload]
        self.handles = [
            remote.options(
                num_cpus=self._cluster.cpus,
                num_gpus=self._cluster.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._cluster.group, placement_group_bundle_index=self._cluster.placement.bundle_of(rank)
                ),
            ).remote(rank, self._settings, self._shards, self._logs / f"worker-{rank}.log")
            for rank in range(self.world)
        ]
        self.who = self.call("info", timeout_s=self._cfg.start_timeout_s)
        self.nodes = self.call("node")
        self._guardians.cover(self.nodes)
        self._listen()
        if self._cfg.shared_storage:
            check_shared(self.call, self.world, self._logs, self.name)
        host = self.call("address", only=[0])[0] if len(set(self.nodes)) > 1 else "127.0.0.1"
        port = self.call("open_store", host, only=[0])[0]
        self.call("start", host, port, timeout_s=self._cfg.start_timeout_s)

    def kill_all(self) -> None:
        """End every worker's process, now."""
        self._listening.set()
        if self._thread is not None:
            self._thread.join()
        for rank in range(len(self.handles)):
            self._kill(rank)
        self.handles = []

    def close(self) -> None:
        """Let the workers end in good order, those that can; the others are killed."""
        if self.handles and not self._lost:
            with contextlib.suppress(WorkerLost, UserError):
                self.call("clear_kept")
                self.call("close", timeout_s=_CLOSE_S)
        self.kill_all()
        self._guardians.sweep()

    def _kill(self, rank: int) -> None:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handles[rank], no_restart=True)
        if rank < len(self.who):
            self._kill_process(rank)

    def _kill_process(self, rank: int) -> None:
        """SIGKILL: Ray's own kill asks a process to end, which one that hangs cannot."""
        who = self.who[rank]
        if who.host == socket.gethostname():
            _kill_here(who.pid)
            return
        where = NodeAffinitySchedulingStrategy(self.nodes[rank], soft=False)
        kill: Any = ray.remote(_kill_here)
        with contextlib.suppress(RayError):
            ray.get(kill.options(num_cpus=0, scheduling_strategy=where).remote(who.pid), timeout=10)

    # ---- calls ----------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        *arguments: Any,
        per_rank: Sequence[Sequence[Any]] | None = None,
        only: Sequence[int] | None = None,
        timeout_s: float = math.inf,
    ) -> list[Any]:
        """The method's results by rank. ``per_rank``: arguments of each rank, in place of the same for all.

        Raises WorkerLost where a worker is lost by then, RunError after ``timeout_s``, and what a worker raised.
        """
        ranks = range(self.world) if only is None else only
        if self._lost:
            raise WorkerLost("; ".join(self._lost.values()))
        self.doing = method
        refs = {}
        for rank in ranks:
            own = per_rank[rank] if per_rank is not None else arguments
            refs[getattr(self.handles[rank], method).remote(*own)] = rank
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while refs:
            for ref in self.wait(list(refs), deadline):
                rank = refs.pop(ref)
                results[rank] = self.result(rank, ref)
            if refs and time.monotonic() > deadline:
                slow = ", ".join(map(self.name, refs.values()))
                do = f"look at {self._logs}/worker-*.log"
                raise RunError(
                    explain(f"cluster: {method}", f"no answer from {slow}", f"one within {timeout_s:g} s", do)
                )
        return [results[rank] for rank in ranks]

    def result(self, rank: int, ref: Any) -> Any:
        """An answer that is there. Raises WorkerLost where the worker is lost instead, and what it raised."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise cause from None
            self._wait_for_a_death()
            if self._lost:  # its peer died in the middle of a collective call: no fault of this one
                raise WorkerLost("; ".join(self._lost.values())) from None
            raise
        except RayActorError:
            raise WorkerLost(self.lose(rank)) from None

    def lose(self, rank: int) -> str:
        """Note that a worker is lost; returns what happened to it."""
        if rank not in self._lost:
            self._lost[rank] = f"{self.name(rank)} died in phase {self.phase!r} (its output: {self.log(rank)})"
        return self._lost[rank]

    @property
    def phase(self) -> str:
        """What the workers are at, or were last: all of them do the same."""
        return _PHASES.get(self.doing, self.doing)

    @property
    def lost(self) -> dict[int, str]:
        return dict(self._lost)

    def name(self, rank: int) -> str:
        who = self.who[rank] if rank < len(self.who) else None
        return f"worker {rank}" + (f" (process {who.pid} on {who.host})" if who else "")

    def log(self, rank: int) -> Path:
        return self._logs / f"worker-{rank}.log"

    def describe(self) -> list[dict[str, Any]]:
        """See ``startup.Workers``; as of each worker's last sign of life."""
        heartbeats, unknown = dict(self._heartbeats), Heartbeat(phase="start", silent_s=0.0)
        rows = [asdict(who) | asdict(heartbeats.get(who.rank, unknown)) for who in self.who]
        return [row | {"phase": "lost"} if row["rank"] in self._lost else row for row in rows]

    def wait(self, refs: Sequence[Any], deadline: float = math.inf, *, gather_s: float = 0.0) -> list[Any]:
        """Those of ``refs`` that are there ``gather_s`` after the first one of them, none where ``deadline``
        (monotonic) passes before; beats meanwhile."""
        while time.monotonic() <= deadline:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=_POLL_S)
            self._beat()
            if ready:
                time.sleep(gather_s)
                more, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
                return list(more)
        return []

    def kill(self, rank: int, reason: str) -> None:
        """End a worker that does not do what it must; it counts as lost."""
        self._lost.setdefault(rank, reason)
        self._kill(rank)

    def _wait_for_a_death(self) -> None:
        deadline = time.monotonic() + _BLAME_S
        while time.monotonic() < deadline and not self._lost:
            for rank, handle in enumerate(self.handles):
                try:
                    ray.get(handle.ping.remote(), timeout=1)
                except RayActorError:
                    self.lose(rank)
                except GetTimeoutError:
                    continue
            time.sleep(0.2)

    # ---- signs of life --------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._hear, args=(self._listening,), name="pulse", daemon=True)
        self._thread.start()

    def _hear(self, ended: threading.Event) -> None:
        """Until told to end: ask all for a pulse; kill whoever gave none for ``hang_s``."""
        handles = list(self.handles)
        heard_s = [time.monotonic()] * len(handles)
        asked: dict[int, Any] = {}
        while not ended.wait(self._cfg.heartbeat_s):
            for rank, handle in enumerate(handles):
                if rank in self._lost:
                    continue
                ref = asked.pop(rank, None) or handle.ping.remote()
                try:
                    self._heartbeats[rank] = ray.get(ref, timeout=0.2)
                    heard_s[rank] = time.monotonic()
                except GetTimeoutError:
                    asked[rank] = ref
                except RayError:
                    continue  # it is dead: the call that waits for it says so
                silent_s = time.monotonic() - heard_s[rank]
                if silent_s > self._cfg.hang_s and not ended.is_set():
                    reason = f"{self.name(rank)} gave no sign of life for {silent_s:.0f} s in phase {self.phase!r} "
                    self.kill(rank, f"{reason}(cluster.hang_s={self._cfg.hang_s:g}) and was killed")


def _kill_here(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def open_cluster(settings: WorkerSettings, *, sweep: Sequence[Path]) -> RayCluster:
    """Connect to Ray, or start a private one, and reserve the room for the workers. ``sweep``: see RayCluster."""
    cfg = settings.cfg
    assert cfg.cluster.cpus_per_worker is not None, "resolved"
    engines = EngineMap.of(cfg)
    return RayCluster(
        cfg.cluster, engines, cpus=cfg.cluster.cpus_per_worker, gpus=int(cfg.device != "cpu"), sweep=sweep
    )
