"""What the loop needs of its workers, and what every worker is built from.

``workers.local`` implements it for the worker in this process, ``workers.cluster.workers`` for workers on Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlpost.config import Config
from rlpost.engine.protocol import Engine
from rlpost.train.protocol import PolicyTrainer
from rlpost.workers.publication import Publication


class Workers(Protocol):
    """The worker in this process, or a cluster of them."""

    @property
    def engine(self) -> Engine: ...

    @property
    def trainer(self) -> PolicyTrainer: ...

    @property
    def device(self) -> DeviceSharing: ...

    def losses(self) -> list[str]:
        """What happened to the workers that were lost since all of them were present."""

    def keep(self, step: int) -> None:
        """Leave the trainer's state after ``step`` steps where a worker's death does not take it."""

    def recover(self, step: int) -> None:
        """Restarts all workers in fresh processes, with that state; the engines' weights are not published.

        Raises ShardsLost where the state is gone, WorkerLost where a worker is lost again.
        """

    def describe(self) -> list[dict[str, Any]]:
        """Of each worker that is a process of its own: rank, host, pid, phase, silent_s (since it made progress)."""

    def close(self) -> None: ...


class DeviceSharing(Protocol):
    """Whose turn it is on the devices of all workers; ``workers.colocation.SharedDevice`` is one worker's."""

    def generating(self) -> AbstractContextManager[None]: ...

    def training(self) -> AbstractContextManager[None]: ...

    def publish_weights(self, policy_version: int) -> Publication: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What every worker of a run is built from, whichever process it lives in."""

    cfg: Config  # resolved
    model_folder: str
    vocab_size: int
    num_params: int
    hidden_size: int
    needs_reference: bool
    max_model_len: int
    canary_prompts: Sequence[np.ndarray]  # the engine's first weights continue them: see workers.canary
    with_engine: bool = True  # False: the worker only trains
    init: str = "pretrained"  # or random: weights from config.json and the seed, not from files
