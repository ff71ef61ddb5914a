"""A worker without engine and trainer that stops dead, as SIGSTOP makes it, in the phase that a file names."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from rlpost.engine.replicas import Exchange, Iterations, Report
from rlpost.workers.cluster.actors import _Actor

METHODS = ("start", "exchange", "stop", "begin_training", "update", "publish", "save", "load", "export", "keep")


class HangingActor(_Actor):
    """Rank 1 hangs in the method that ``orders`` names; every other call returns at once."""

    def __init__(self, rank: int, settings: Any, shards: Path, log: Path) -> None:
        super().__init__(rank, settings, shards, log)
        self._orders = log.with_name("orders")

    def open_store(self, host: str) -> int:
        return 0

    def _obey(self, method: str) -> Report:
        if self.rank == 1 and self._orders.exists() and self._orders.read_text() == method:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)  # this thread may run on for a moment
        return Report(replica=self.rank, ended=(), running=None, iterations=Iterations())


def _obeying(method: str) -> Any:
    def call(self: HangingActor, *arguments: Any) -> Report:
        return self._obey(method)

    call.__name__ = method
    return call


for _name in METHODS:
    setattr(HangingActor, _name, _obeying(_name))

NO_REQUESTS = Exchange(requests=())
