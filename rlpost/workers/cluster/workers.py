"""A run's workers on Ray, behind the interface the run knows: one engine, one trainer, one shared device.

Joins the actors with ``engine.replicas`` (generation) and ``workers.cluster.trainer_group`` (updates). A lost worker
takes its ZeRO shard and the process group with it, so all ranks are rebuilt in fresh processes and load the state that
the old ones kept outside. ``workers.recovery`` decides when.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpost.engine.replicas import Exchange, Loss, ReplicaEngine, Report, gather_s
from rlpost.errors import ShardsLost, WorkerLost
from rlpost.workers.cluster.actors import Actors, RayCluster, open_cluster
from rlpost.workers.cluster.files import Courier, copy_common
from rlpost.workers.cluster.gc_pause import CycleSearch
from rlpost.workers.cluster.shards import PREFIX, attempt_dir
from rlpost.workers.cluster.trainer_group import TrainerGroup
from rlpost.workers.engine_map import EngineMap
from rlpost.workers.protocol import WorkerSettings
from rlpost.workers.publication import Publication

SCRATCH = "rlpost-scratch"
LOGS = "workers"  # folder of the run directory with the workers' output


class ClusterWorkers:
    """Implements ``workers.protocol.Workers``."""

    def __init__(
        self,
        cluster: RayCluster,
        actors: Actors,
        settings: WorkerSettings,
        *,
        scratch: Path,
        say: Callable[[str], None],
    ) -> None:
        """``scratch``: folder on each worker's machine, for files if no storage is shared."""
        self._cluster, self._actors, self._settings, self._say = cluster, actors, settings, say
        self._scratch = scratch
        shared = settings.cfg.cluster.shared_storage
        self.trainer = TrainerGroup(
            actors.call,
            world=actors.world,
            hidden_size=settings.hidden_size,
            courier=None if shared else Courier(actors.call, world=actors.world, scratch=scratch),
        )
        self._keeps = settings.cfg.cluster.keep_shards
        self._kept: int | None = None  # the newest step whose state all workers have kept outside
        self.device: ClusterDevice
        self.engine: ReplicaEngine

    def start(self) -> None:
        """Raises WorkerLost if workers are lost during the start more often than ``cluster.max_recoveries``."""
        cluster = self._settings.cfg.cluster
        for left in reversed(range(cluster.max_recoveries + 1)):
            try:
                self._actors.start()
                self._actors.call("clear_kept")
                self._actors.call("clear_attempts", self._scratch)
                can_keep = all(self._actors.call("can_keep"))
                break
            except WorkerLost as lost:
                if not left:
                    raise
                self._say(f"{lost}; restarting all workers")
                self._actors.kill_all()
        if self._keeps and not can_keep:
            self._say(
                f"{cluster.shards_dir} has no room for the trainer's state (cluster.keep_shards): losing a worker will "
                "send the run back to its last checkpoint"
            )
            self._keeps = False
        self._renew()

    def losses(self) -> list[str]:
        return list(self._actors.lost.values())

    def keep(self, step: int) -> None:
        if not self._keeps:
            return
        self._actors.call("keep", step)
        self._kept = step
        with suppress(WorkerLost):  # the step is already kept, as requested; the loss is in losses()
            self._actors.call("drop_kept", step)

    def recover(self, step: int) -> None:
        turn = self.device.turn
        self._actors.kill_all()
        gone = f"the trainer's state after step {step} was lost with the workers"
        if self._kept != step:
            raise ShardsLost(gone)
        self._actors.start()
        if any(step not in kept for kept in self._actors.call("kept_steps")):
            raise ShardsLost(gone)
        copy_common(self._actors.call, self._actors.call("kept_folder", step), self._actors.nodes)
        self._actors.call("load_kept", step)
        self._renew()  # last: if workers are lost before, it is still known who has the device
        if turn == "trainer":
            with self.device.training():
                pass

    def describe(self) -> list[dict[str, Any]]:
        return self._actors.describe()

    def close(self) -> None:
        self._actors.close()
        self._cluster.close()

    def _renew(self) -> None:
        """Recreate the objects that hold state of the workers' processes."""
        cfg = self._settings.cfg
        slots, timeout_s = cfg.slots_per_engine, cfg.cluster.abort_timeout_s
        transport = RayReplicas(
            self._actors,
            EngineMap.of(cfg),
            slots=slots,
            exchange_s=cfg.cluster.exchange_s,
            abort_timeout_s=timeout_s,
        )
        self.engine = ReplicaEngine(transport, reserve_share=cfg.cluster.reserve_share)
        self.device = ClusterDevice(self._actors, self.engine)


class ClusterDevice:
    """All workers take their turns together; each worker has its own device (``workers.colocation``)."""

    def __init__(self, actors: Actors, engine: ReplicaEngine) -> None:
        self._actors, self._engine = actors, engine
        self._cycle_search = CycleSearch(engine.now)
        self.turn = "engine"

    @contextmanager
    def generating(self) -> Iterator[None]:
        assert self.turn == "engine", "publish_weights() gives the device to the engine"
        with self._cycle_search.held_back():
            yield
        assert self._engine.num_in_flight == 0, "requests were left in flight"

    @contextmanager
    def training(self) -> Iterator[None]:
        if self.turn == "engine":
            self.turn = "trainer"
            self._actors.call("begin_training")
        yield

    def publish_weights(self, policy_version: int) -> Publication:
        """Every rank publishes to the engine beside it. The parts' times are those of the slowest worker."""
        started = time.perf_counter()
        publications: list[Publication] = self._actors.call("publish", policy_version)
        self.turn = "engine"
        return replace(
            max(publications, key=lambda p: p.duration_s),
            duration_s=time.perf_counter() - started,
            canary_mean=max(p.canary_mean for p in publications),
            canary_max=max(p.canary_max for p in publications),
        )


class RayReplicas:
    """The transport of ``engine.replicas`` over actors: every engine is a replica.

    An engine's leader takes the exchange and replies; its other members are told to follow, call by call. An engine
    that loses a member is lost, and its remaining members are killed at once: they might wait for the others forever.
    """

    def __init__(
        self, actors: Actors, engines: EngineMap, *, slots: int, exchange_s: float, abort_timeout_s: float
    ) -> None:
        self._actors, self._engines = actors, engines
        self._gather_s = gather_s(engines.num_engines, exchange_s)
        self.slots: Sequence[int] = [slots] * engines.num_engines
        self._under_way: list[deque[Any]] = [deque() for _ in self.slots]  # the leaders' outstanding replies, in order
        self._following: dict[Any, int] = {}  # calls to other members: rank
        self._timeout_s = abort_timeout_s
        self._num_stops = 0

    def send(self, exchanges: Sequence[tuple[int, Exchange]]) -> None:
        self._actors.doing = "generate"
        for replica, exchange in exchanges:
            handle = self._actors.handles[self._engines.leader(replica)]
            self._under_way[replica].append(handle.exchange.remote(exchange))
            self._let_follow(replica)

    def wait(self) -> Sequence[Report | Loss]:
        reports: list[Report | Loss] = []
        while not reports:
            reports = self._receive(gather_s=self._gather_s)
        return reports

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        self._num_stops += 1
        for n in replicas:
            handle = self._actors.handles[self._engines.leader(n)]
            handle.halt.remote(self._num_stops)
            self._under_way[n].append(handle.stop.remote(self._num_stops))
            self._let_follow(n)
        deadline = time.monotonic() + self._timeout_s
        reports: list[Report | Loss] = []
        while any(self._under_way):
            reports += self._receive(deadline)
            if time.monotonic() > deadline:
                for n in [n for n, replies in enumerate(self._under_way) if replies]:
                    leader = self._engines.leader(n)
                    reason = f"{self._actors.name(leader)} did not end its requests within {self._timeout_s:g} s"
                    self._actors.kill(leader, f"{reason} (cluster.abort_timeout_s) and was killed")
                    reports.append(self._lose(n))
        return reports

    def now(self) -> float:
        return time.perf_counter()

    def _let_follow(self, n: int) -> None:
        for rank in self._engines.members(n)[1:]:
            self._following[self._actors.handles[rank].follow.remote()] = rank

    def _receive(self, deadline: float = math.inf, *, gather_s: float = 0.0) -> list[Report | Loss]:
        """What has arrived; may be empty if only members' follow calls have returned."""
        heads = {replies[0]: n for n, replies in enumerate(self._under_way) if replies}
        reports: list[Report | Loss] = []
        for ref in self._actors.wait([*heads, *self._following], deadline, gather_s=gather_s):
            n = heads[ref] if ref in heads else self._engines.engine_of(self._following[ref])
            rank = self._following.pop(ref, self._engines.leader(n))
            if ref in heads and not self._under_way[n]:
                continue  # its engine was lost in the meantime
            try:
                reply = self._actors.result(rank, ref)
            except WorkerLost:
                reports.append(self._lose(n))
                continue
            if ref in heads:
                self._under_way[n].popleft()
                reports.append(reply)
        return reports

    def _lose(self, n: int) -> Loss:
        self._under_way[n].clear()
        members = self._engines.members(n)
        if not any(rank in self._actors.lost for rank in members):
            self._actors.lose(members[0])
        reason = "; ".join(self._actors.lost[rank] for rank in members if rank in self._actors.lost)
        for rank in members:
            if rank not in self._actors.lost:
                self._actors.kill(rank, f"{self._actors.name(rank)} was killed: its engine lost another member")
        return Loss(replica=n, reason=reason)


def start_cluster(
    settings: WorkerSettings, run_dir: Path, *, say: Callable[[str], None], beat: Callable[[], None]
) -> ClusterWorkers:
    """Start Ray, the workers and their parts. Raises RunError if there is no room, or they do not start in time."""
    run_dir = run_dir.absolute()
    shards = attempt_dir(settings.cfg.cluster.shards_dir, PREFIX, run_dir)
    scratch = attempt_dir(settings.cfg.cluster.scratch_dir, SCRATCH, run_dir)
    cluster = open_cluster(settings, temporary=[shards, scratch])
    try:
        actors = Actors(cluster, settings, shards=shards, scratch=scratch, logs=run_dir / LOGS, beat=beat)
        workers = ClusterWorkers(cluster, actors, settings, scratch=scratch, say=say)
        try:
            workers.start()
        except BaseException:
            actors.kill_all()
            raise
    except BaseException:
        cluster.close()
        raise
    return workers
