"""Ray: the workers as actors, their placement, calls to all of them, heartbeats, shutdown.

Owns every use of Ray except for the actors that clean up (``workers.cluster.cleanup``).

An actor is a :class:`~rlpost.workers.cluster.worker.ClusterWorker` with one GPU, or some CPUs, in one placement group.
Nothing here knows what the calls mean. A worker that dies, or that sends no heartbeat for ``cluster.hang_s`` and is
killed for it, is reported by the next call as ``errors.WorkerLost``; restarting is all or nothing, since a process
group is never formed again inside a process that had one.

Who waits for whom: calls wait for all workers' results, and end early when one is lost. A separate thread requests a
heartbeat from every worker; it is what ends a wait for a worker that hangs.
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
from rlpost.workers.runtime import require_gpus

_POLL_S = 0.5  # how long one wait for results lasts before the caller's beat
_BLAME_S = 15.0  # after a rank's collective call failed: how long until its peer's death must be known
_CONNECT_S = 10.0
_CLOSE_S = 20.0  # a worker that takes longer to end is killed
_PHASES = {  # the phases of worker methods that are not named after their phase
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
    """A worker whose heartbeats have their own threads."""

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
    """The connection to Ray and the resources reserved for the workers. ``close()`` releases everything."""

    def __init__(
        self, cfg: ClusterConfig, engines: EngineMap, *, cpus: int, gpus: int, temporary: Sequence[Path]
    ) -> None:
        """cpus, gpus: per worker. ``temporary``: folders removed when this process ends, in whatever way.

        Raises RunError if Ray cannot be reached or has no room for the workers.
        """
        self.is_private = cfg.address is None
        self._temp = Path(tempfile.mkdtemp(prefix="rlpost-ray-")) if self.is_private else None
        self._cleaner = Cleaner(temporary, private=self._temp)
        self.cpus, self.gpus = cpus, gpus
        try:
            self._connect(cfg)
            self.group, self.placement = self._reserve(cfg, engines)
        except BaseException:
            self._disconnect()
            raise

    def _connect(self, cfg: ClusterConfig) -> None:
        if self.is_private:
            require_gpus(self.gpus * cfg.num_workers)
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
            if port.isdigit():  # Ray itself would retry for minutes
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
        self._cleaner.clean_up()


class Actors:
    """All workers of a run. Calls are made by one thread; a second one listens to their heartbeats."""

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
        """What every worker is given, and how it is watched.

        Args:
            cluster: where workers are started.
            settings: what they are built from.
            shards: folder for kept states, on each worker's machine.
            scratch: folder for files in transit; removed with the run.
            logs: folder for the workers' output.
            beat: called while waiting.
            actor: the class of the workers.
        """
        self._actor, self._guardians = actor, Guardians([shards, scratch])
        self._cluster, self._settings, self._cfg = cluster, settings, settings.cfg.cluster
        self._shards, self._logs, self._beat = shards, logs, beat
        self.world = self._cfg.num_workers
        self.handles: list[Any] = []
        self.infos: list[WorkerInfo] = []
        self.nodes: list[str] = []
        self._lost: dict[int, str] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self.doing = "start"  # what the workers were last told to do
        self._listening = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- start and end --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fresh processes for all ranks. Raises WorkerLost if one dies, RunError if they take too long."""
        self._lost, self._heartbeats, self.infos, self.doing = {}, {}, [], "start"
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
        self.infos = self.call("info", timeout_s=self._cfg.start_timeout_s)
        self.nodes = self.call("node")
        self._guardians.cover(self.nodes)
        self._listen()
        if self._cfg.shared_storage:
            check_shared(self.call, self.world, self._logs, self.name)
        host = self.call("address", only=[0])[0] if len(set(self.nodes)) > 1 else "127.0.0.1"
        port = self.call("open_store", host, only=[0])[0]
        self.call("start", host, port, timeout_s=self._cfg.start_timeout_s)

    def kill_all(self) -> None:
        """Kill every worker's process immediately."""
        self._listening.set()
        if self._thread is not None:
            self._thread.join()
        for rank in range(len(self.handles)):
            self._kill(rank)
        self.handles = []

    def close(self) -> None:
        """Let the workers shut down cleanly, if they can; kill the others."""
        if self.handles and not self._lost:
            with contextlib.suppress(WorkerLost, UserError):
                self.call("clear_kept")
                self.call("close", timeout_s=_CLOSE_S)
        self.kill_all()
        self._guardians.clean_up()

    def _kill(self, rank: int) -> None:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handles[rank], no_restart=True)
        if rank < len(self.infos):
            self._kill_process(rank)

    def _kill_process(self, rank: int) -> None:
        """SIGKILL: Ray's own kill asks a process to exit, which a hanging one cannot."""
        info = self.infos[rank]
        if info.host == socket.gethostname():
            _kill_here(info.pid)
            return
        where = NodeAffinitySchedulingStrategy(self.nodes[rank], soft=False)
        kill: Any = ray.remote(_kill_here)
        with contextlib.suppress(RayError):
            ray.get(kill.options(num_cpus=0, scheduling_strategy=where).remote(info.pid), timeout=10)

    # ---- calls ----------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        *arguments: Any,
        per_rank: Sequence[Sequence[Any]] | None = None,
        only: Sequence[int] | None = None,
        timeout_s: float = math.inf,
    ) -> list[Any]:
        """The method's results by rank. ``per_rank``: arguments for each rank, instead of the same for all.

        Raises WorkerLost if a worker is lost by then, RunError after ``timeout_s``, and what a worker raised.
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
                do = f"check {self._logs}/worker-*.log"
                raise RunError(
                    explain(f"cluster: {method}", f"no response from {slow}", f"one within {timeout_s:g} s", do)
                )
        return [results[rank] for rank in ranks]

    def result(self, rank: int, ref: Any) -> Any:
        """A result that has arrived. Raises WorkerLost if the worker is lost instead, and what it raised."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise cause from None
            self._wait_for_a_death()
            if self._lost:  # its peer died during a collective call: not this worker's fault
                raise WorkerLost("; ".join(self._lost.values())) from None
            raise
        except RayActorError:
            raise WorkerLost(self.lose(rank)) from None

    def lose(self, rank: int) -> str:
        """Record that a worker is lost; returns what happened to it."""
        if rank not in self._lost:
            self._lost[rank] = f"{self.name(rank)} died in phase {self.phase!r} (its output: {self.log(rank)})"
        return self._lost[rank]

    @property
    def phase(self) -> str:
        """The workers' current or last phase: all of them do the same."""
        return _PHASES.get(self.doing, self.doing)

    @property
    def lost(self) -> dict[int, str]:
        return dict(self._lost)

    def name(self, rank: int) -> str:
        info = self.infos[rank] if rank < len(self.infos) else None
        return f"worker {rank}" + (f" (process {info.pid} on {info.host})" if info else "")

    def log(self, rank: int) -> Path:
        return self._logs / f"worker-{rank}.log"

    def describe(self) -> list[dict[str, Any]]:
        """See ``workers.protocol.Workers``; as of each worker's last heartbeat."""
        heartbeats, unknown = dict(self._heartbeats), Heartbeat(phase="start", silent_s=0.0)
        rows = [asdict(info) | asdict(heartbeats.get(info.rank, unknown)) for info in self.infos]
        return [row | {"phase": "lost"} if row["rank"] in self._lost else row for row in rows]

    def wait(self, refs: Sequence[Any], deadline: float = math.inf, *, gather_s: float = 0.0) -> list[Any]:
        """Those of ``refs`` that are ready ``gather_s`` after the first one; none if ``deadline`` (monotonic) passes
        before that. Beats in the meantime."""
        while time.monotonic() <= deadline:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=_POLL_S)
            self._beat()
            if ready:
                time.sleep(gather_s)
                more, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
                return list(more)
        return []

    def kill(self, rank: int, reason: str) -> None:
        """Kill a worker that does not do what it must; it counts as lost."""
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

    # ---- heartbeats -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._receive, args=(self._listening,), name="heartbeats", daemon=True)
        self._thread.start()

    def _receive(self, ended: threading.Event) -> None:
        """Until ``ended`` is set: request heartbeats from all; kill workers that sent none for ``hang_s``."""
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
                    continue  # it is dead: the call that waits for it reports that
                silent_s = time.monotonic() - heard_s[rank]
                if silent_s > self._cfg.hang_s and not ended.is_set():
                    reason = f"{self.name(rank)} sent no heartbeat for {silent_s:.0f} s in phase {self.phase!r} "
                    self.kill(rank, f"{reason}(cluster.hang_s={self._cfg.hang_s:g}) and was killed")


def _kill_here(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def open_cluster(settings: WorkerSettings, *, temporary: Sequence[Path]) -> RayCluster:
    """Connect to Ray, or start a private one, and reserve resources for the workers. ``temporary``: see RayCluster."""
    cfg = settings.cfg
    assert cfg.cluster.cpus_per_worker is not None, "resolved"
    engines = EngineMap.of(cfg)
    return RayCluster(
        cfg.cluster, engines, cpus=cfg.cluster.cpus_per_worker, gpus=int(cfg.device != "cpu"), temporary=temporary
    )
