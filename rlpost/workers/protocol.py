"""What the loop needs of its workers, and what every worker is built from.

``workers.local`` implements it for the worker in this process, ``workers.cluster.workers`` for workers on Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlpost.config import Config

if TYPE_CHECKING:
    from rlpost.engine.protocol import Engine
    from rlpost.train.protocol import PolicyTrainer
from contextlib import AbstractContextManager

from rlpost.workers.publication import Publication


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
    canary: Sequence[np.ndarray]  # sequences that trainer and engine score at each publication


class Turns(Protocol):
    """Whose turn it is on the devices of all workers; ``workers.colocation.Device`` is one worker's."""

    def generating(self) -> AbstractContextManager[None]: ...

    def training(self) -> AbstractContextManager[None]: ...

    def publish_weights(self, policy_version: int) -> Publication: ...
