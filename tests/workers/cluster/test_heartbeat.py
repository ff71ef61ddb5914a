"""A worker that hangs is noticed in every phase, ended, and named with its phase. Real Ray, real SIGSTOP, no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlpost.config import Config
from rlpost.engine.replicas import Loss
from rlpost.errors import WorkerLost
from rlpost.workers.cluster.actors import Actors, RayCluster
from rlpost.workers.cluster.workers import RayReplicas
from rlpost.workers.engine_map import EngineMap
from tests.workers.cluster.bare import settings_of
from tests.workers.cluster.hanging import NO_REQUESTS, HangingActor

pytestmark = pytest.mark.own_process
HANG_S = 2.0


@pytest.fixture(scope="module")
def cluster():
    cfg = config()
    cluster = RayCluster(cfg.cluster, EngineMap.of(cfg), cpus=1, gpus=0, temporary=[])
    yield cluster
    cluster.close()


def config() -> Config:
    cfg = Config()
    cfg.cluster.kind, cfg.cluster.num_workers = "ray", 2
    cfg.cluster.heartbeat_s, cfg.cluster.hang_s = 0.2, HANG_S
    return cfg


@pytest.fixture
def actors(cluster: RayCluster, tmp_path: Path):
    actors = Actors(
        cluster,
        settings_of(config()),
        shards=tmp_path / "kept-1",
        scratch=tmp_path / "scratch-1",
        logs=tmp_path / "logs",
        beat=lambda: None,
        actor=HangingActor,
    )
    yield actors
    actors.kill_all()


def order_to_hang(actors: Actors, method: str) -> None:
    actors.log(0).parent.mkdir(exist_ok=True)
    actors.log(0).with_name("orders").write_text(method)


def calling(method: str) -> Callable[[Actors], Any]:
    return lambda actors: actors.call(method)


def generating(actors: Actors) -> None:
    """As the replica engine does it: the loss is an answer there, which generation goes on without."""
    transport = RayReplicas(actors, EngineMap.of(config()), slots=4, exchange_s=1.0, abort_timeout_s=60.0)
    for replica in (0, 1):
        transport.send([(replica, NO_REQUESTS)])
    answers = [*transport.wait()]
    while not any(isinstance(answer, Loss) for answer in answers):
        answers += transport.wait()
    (loss,) = [answer for answer in answers if isinstance(answer, Loss)]
    raise WorkerLost(loss.reason)


PHASES = [  # (method that hangs, phase that is named, what the controller does)
    ("exchange", "generate", generating),
    ("update", "update", calling("update")),
    ("publish", "publish", calling("publish")),
    ("save", "save", calling("save")),
    pytest.param("export", "save", calling("export"), marks=pytest.mark.slow),
    pytest.param("load", "load", calling("load"), marks=pytest.mark.slow),
    pytest.param("keep", "keep", calling("keep"), marks=pytest.mark.slow),
    pytest.param("begin_training", "update", calling("begin_training"), marks=pytest.mark.slow),
]


def test_a_worker_that_hangs_while_it_starts_is_named_with_its_phase(actors: Actors) -> None:
    order_to_hang(actors, "start")
    with pytest.raises(WorkerLost, match=r"worker 1 \(process .*no heartbeat for . s in phase 'start'.*was killed"):
        actors.start()
    before = [info.pid for info in actors.infos]
    actors.kill_all()
    actors.log(0).with_name("orders").unlink()
    actors.start()
    assert not actors.lost and not {info.pid for info in actors.infos} & {*before}, "fresh ones, by their own ids"


@pytest.mark.parametrize("method, phase, act", PHASES)
def test_a_worker_that_hangs_is_named_with_its_phase(
    actors: Actors, method: str, phase: str, act: Callable[[Actors], Any]
) -> None:
    order_to_hang(actors, method)
    actors.start()
    with pytest.raises(WorkerLost, match=rf"worker 1 \(process .*no heartbeat for . s in phase '{phase}'"):
        act(actors)
    assert list(actors.lost) == [1], "the one that hangs, and no other"


def test_a_worker_that_does_not_stop_in_time_is_named_and_the_other_s_report_counts(actors: Actors) -> None:
    order_to_hang(actors, "stop")
    actors.start()
    answers = RayReplicas(actors, EngineMap.of(config()), slots=4, exchange_s=1.0, abort_timeout_s=1.0).stop([0, 1])
    reason = next(answer.reason for answer in answers if isinstance(answer, Loss))
    assert "worker 1" in reason and "did not end its requests within 1 s" in reason
    assert [answer.replica for answer in answers if not isinstance(answer, Loss)] == [0]
