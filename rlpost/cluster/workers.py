"""A run's workers on Ray, behind what the loop knows: one engine, one trainer, one device whose turn it is.

Joins the actors with ``rollout.replicas`` (generation) and ``cluster.ranks`` (updates), and owns recovery: a worker
that is lost takes its ZeRO shard and the process group along, so all ranks are built anew in fresh processes and load
the state that the old ones had left outside. The loop decides when.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpost.cluster.actors import Actors, RayCluster, open_cluster
from rlpost.cluster.ranks import RankedTrainer
from rlpost.cluster.shards import shards_folder
from rlpost.colocation import Publication
from rlpost.errors import ShardsLost, WorkerLost
from rlpost.rollout.replicas import Exchange, Loss, ReplicaEngine, Report
from rlpost.startup import WorkerSettings, collect_garbage_rarely

LOGS = "workers"  # folder of the run directory with what the workers print


class ClusterWorkers:
    """Implements ``startup.Workers``."""

    def __init__(
        self, cluster: RayCluster, actors: Actors, settings: WorkerSettings, say: Callable[[str], None]
    ) -> None:
        self._cluster, self._actors, self._settings, self._say = cluster, actors, settings, say
        self.trainer = RankedTrainer(actors.call, world=actors.world, hidden_size=settings.hidden_size)
        self._keeps = settings.cfg.cluster.keep_shards
        self._kept: int | None = None  # the newest step whose state all workers left outside
        self.device: ClusterDevice
        self.engine: ReplicaEngine

    def start(self) -> None:
        self._actors.start()
        self._actors.call("clear_kept")
        if self._keeps and not all(self._actors.call("can_keep")):
            cluster = self._settings.cfg.cluster
            self._say(
                f"{cluster.shards_dir} has no room for the trainer's state (cluster.keep_shards): a lost worker will "
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
        self._actors.call("drop_kept", step)

    def recover(self, step: int) -> None:
        turn = self.device.turn
        self._actors.kill_all()
        gone = f"the trainer's state after step {step} is gone with the lost workers"
        if self._kept != step:
            raise ShardsLost(gone)
        self._actors.start()
        self._renew()
        if any(step not in kept for kept in self._actors.call("kept_steps")):
            raise ShardsLost(gone)
        self._actors.call("load_kept", step)
        if turn == "trainer":
            with self.device.training():
                pass

    def describe(self) -> list[dict[str, Any]]:
        return self._actors.describe()

    def close(self) -> None:
        self._actors.close()
        self._cluster.close()

    def _renew(self) -> None:
        """What holds state of the workers' processes."""
        cfg = self._settings.cfg
        slots, timeout_s = cfg.engine.max_slots, cfg.cluster.abort_timeout_s
        transport = RayReplicas(self._actors, slots=slots, abort_timeout_s=timeout_s)
        self.engine = ReplicaEngine(transport, reserve_share=cfg.cluster.reserve_share)
        self.device = ClusterDevice(self._actors, self.engine)


class ClusterDevice:
    """All workers take their turns together; see ``colocation.Device``, of which each worker has one."""

    def __init__(self, actors: Actors, engine: ReplicaEngine) -> None:
        self._actors, self._engine = actors, engine
        self.turn = "engine"

    @contextmanager
    def generating(self) -> Iterator[None]:
        assert self.turn == "engine", "publish_weights() gives the device to the engine"
        yield
        assert self._engine.num_in_flight == 0, "requests were left in flight"

    @contextmanager
    def training(self) -> Iterator[None]:
        if self.turn == "engine":
            self.turn = "trainer"
            self._actors.call("begin_training")
        yield

    def publish_weights(self, policy_version: int) -> Publication:
        """Every rank publishes to the engine beside it. The parts' times are the slowest worker's."""
        started = time.perf_counter()
        publications: list[Publication] = self._actors.call("publish", policy_version)
        self.turn = "engine"
        return replace(
            max(publications, key=lambda p: p.duration_s),
            duration_s=time.perf_counter() - started,
            canary_max=max(p.canary_max for p in publications),
        )


class RayReplicas:
    """The transport of ``rollout.replicas`` over actors: every worker is a replica."""

    def __init__(self, actors: Actors, *, slots: int, abort_timeout_s: float) -> None:
        self._actors = actors
        self.slots: Sequence[int] = [slots] * actors.world
        self._under_way: list[deque[Any]] = [deque() for _ in self.slots]  # answers to come, in order
        self._timeout_s = abort_timeout_s
        self._num_stops = 0

    def send(self, replica: int, exchange: Exchange) -> None:
        self._actors.doing = "generate"
        self._under_way[replica].append(self._actors.handles[replica].exchange.remote(exchange))

    def wait(self) -> Sequence[Report | Loss]:
        heads = {answers[0]: n for n, answers in enumerate(self._under_way) if answers}
        return [self._take(heads[ref]) for ref in self._actors.wait(list(heads))]

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        self._num_stops += 1
        for n in replicas:
            handle = self._actors.handles[n]
            handle.halt.remote(self._num_stops)
            self._under_way[n].append(handle.stop.remote(self._num_stops))
        deadline = time.monotonic() + self._timeout_s
        reports: list[Report | Loss] = []
        while waiting := {answers[0]: n for n, answers in enumerate(self._under_way) if answers}:
            for ref in self._actors.wait(list(waiting), deadline):
                reports.append(self._take(waiting[ref]))
            if time.monotonic() > deadline:
                for n in {n for n, answers in enumerate(self._under_way) if answers}:
                    reason = f"{self._actors.name(n)} did not end its requests within {self._timeout_s:g} s"
                    self._actors.kill(n, f"{reason} (cluster.abort_timeout_s) and was killed")
                    reports.append(self._lose(n))
        return reports

    def now(self) -> float:
        return time.perf_counter()

    def _take(self, n: int) -> Report | Loss:
        ref = self._under_way[n].popleft()
        try:
            report: Report = self._actors.result(n, ref)
            return report
        except WorkerLost:
            return self._lose(n)

    def _lose(self, n: int) -> Loss:
        self._under_way[n].clear()
        return Loss(replica=n, reason=self._actors.lose(n))


def start_cluster(
    settings: WorkerSettings, run_dir: Path, *, say: Callable[[str], None], beat: Callable[[], None]
) -> ClusterWorkers:
    """Ray, the workers and their parts. Raises RunError where there is no room, or they do not start in time."""
    collect_garbage_rarely()
    run_dir = run_dir.absolute()
    shards = shards_folder(settings.cfg.cluster.shards_dir, run_dir)
    cluster = open_cluster(settings, shards=shards)
    try:
        actors = Actors(cluster, settings, shards=shards, logs=run_dir / LOGS, beat=beat)
        workers = ClusterWorkers(cluster, actors, settings, say)
        try:
            workers.start()
        except BaseException:
            actors.kill_all()
            raise
    except BaseException:
        cluster.close()
        raise
    return workers
