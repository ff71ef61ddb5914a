"""The trainer protocol: what the loop needs of a policy being trained, one rank or many.

``train.deepspeed_trainer`` implements it for a rank, ``workers.cluster.trainer_group`` for all ranks together. A
rank's calls are collective: all ranks make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlpost.types import PackedRow, TrainBatch

# objective(logprobs[L], entropy[L], row, batch) -> (loss sum over the row, already divided by the global
# denominators; sums of metrics over the row). Tensors on the trainer's device; see algos.objective.
Objective = Callable[[Any, Any, PackedRow, TrainBatch], tuple[Any, Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one optimizer step did. A skipped step (NaN or infinite gradient) applied nothing."""

    applied: bool
    loss: float
    grad_norm: float  # before clipping
    lr: float
    metrics: Mapping[str, float]
    num_tokens: int


class PolicyTrainer(Protocol):
    def update(self, batch: TrainBatch, objective: Objective) -> UpdateResult:
        """One optimizer step over the batch's rows."""

    def logprobs(self, rows: Sequence[PackedRow], *, reference: bool = False) -> list[Any]:
        """f32[L] per row, at the rollout temperature, without gradient; of the frozen reference if asked."""

    def save(self, folder: Path) -> None: ...

    def save_config(self, folder: Path) -> None:
        """The model's configuration files, without weights."""

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """A Hugging Face folder (safetensors and config)."""

    def close(self) -> None: ...


class ColocatedTrainer(PolicyTrainer, Protocol):
    """One rank, which shares its device with an engine: what ``workers.colocation`` needs besides."""

    def score(self, sequences: Sequence[Any]) -> list[Any]:
        """Logprobs at temperature 1 of each sequence's tokens given those before: f32[len - 1] each."""

    def iter_weights(self, max_bytes: int) -> Iterator[list[tuple[str, Any]]]:
        """HF-named tensors in buckets, valid until the next; consume it to the end."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...
