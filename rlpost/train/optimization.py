"""How gradients become an update: the optimizer, and how the ranks' gradients are combined, as the configuration says.

The one place where both are chosen, and the only one that knows which ranks share a machine. A user's own of either
plugs in by ``_target_``. DeepSpeed's keys are ``train.zero``'s. Called by ``train.deepspeed_trainer``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rlpost.config import TrainConfig, plugins
from rlpost.errors import one_line
from rlpost.train.table import GRADIENT_REDUCTIONS, OPTIMIZERS


@dataclass(frozen=True, slots=True)
class Ranks:
    """The trainer's ranks; ``machines`` names each one's machine, in the order of the ranks."""

    rank: int
    machines: tuple[str, ...]

    @property
    def world(self) -> int:
        return len(self.machines)

    @property
    def neighbors(self) -> tuple[int, ...]:
        """The ranks on this rank's machine, itself included."""
        return tuple(r for r, machine in enumerate(self.machines) if machine == self.machines[self.rank])


class GradientReduction(Protocol):
    """Combines the ranks' gradients."""

    @property
    def groups(self) -> Any | None:
        """Over which ranks ZeRO shards and averages: what ``deepspeed.initialize`` takes as ``mpu``; None: over all."""

    def exchange(self, gradients: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Before each optimizer step: turns this rank's averaged shards into those over all ranks, in place.

        gradients: by parameter group, shards of any shape in the order of DeepSpeed's partition. A NaN or infinity of
        any rank must reach all of them, or ranks would disagree about whether a step was applied.
        """


class AllRanks:
    """ZeRO's own: sharded and averaged over all ranks, and nothing is left to exchange."""

    groups = None

    def exchange(self, gradients: Mapping[int, Sequence[torch.Tensor]]) -> None:
        pass


def all_ranks(ranks: Ranks) -> GradientReduction:
    return AllRanks()


def adamw(module: nn.Module, *, train: TrainConfig, device: str, ranks: Ranks) -> torch.optim.Optimizer:
    """Torch's fused AdamW; at stage 3 on a GPU DeepSpeed's, whose states it moves itself, where that can be built."""
    settings: dict[str, Any] = {
        "lr": train.lr,
        "betas": (train.betas[0], train.betas[1]),
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    if device != "cpu" and train.zero_stage == 3 and not train.offload_optimizer:
        try:
            # importlib, because the type checker cannot see into DeepSpeed's ops.
            fused_adam = importlib.import_module("deepspeed.ops.adam").FusedAdam
            return fused_adam(module.parameters(), adam_w_mode=True, **settings)
        except Exception as error:  # compiled on first use: no nvcc, or one that does not match torch's headers
            if ranks.rank == 0:
                print(f"rlpost: {_describe_failed_build(error)}", file=sys.stderr, flush=True)
    return torch.optim.AdamW(module.parameters(), fused=True, **settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """What the trainer initializes DeepSpeed with."""

    optimizer: torch.optim.Optimizer
    reduction: GradientReduction


def choose_optimization(module: nn.Module, train: TrainConfig, *, device: str, ranks: Ranks) -> Optimization:
    """``train.optimizer`` over the module's parameters, and ``train.gradient_reduction``. Raises ConfigError.

    A user's own are called as ``fn(module, *, train, device, ranks)``, which returns a torch optimizer, and as
    ``fn(ranks)``, which returns a :class:`GradientReduction`.
    """
    make_optimizer = plugins.resolve_target(train.optimizer, OPTIMIZERS, "train.optimizer")
    make_reduction = plugins.resolve_target(train.gradient_reduction, GRADIENT_REDUCTIONS, "train.gradient_reduction")
    return Optimization(
        optimizer=make_optimizer(module, train=train, device=device, ranks=ranks), reduction=make_reduction(ranks)
    )


def install_exchange(engine: Any, reduction: GradientReduction) -> None:
    """Has DeepSpeed's optimizer call ``reduction.exchange`` before each step, on the shards that it averaged.

    ZeRO's own reduction is left alone.

    There is no public hook for gradients; ``averaged_gradients`` holds them at stages 1 to 3 (DeepSpeed 0.19.8), and
    norm and clipping come after.
    """
    if isinstance(reduction, AllRanks):
        return
    optimizer = engine.optimizer
    step = optimizer.step

    def exchange_and_step(*arguments: Any, **options: Any) -> Any:
        reduction.exchange({group: shards for group, shards in optimizer.averaged_gradients.items() if shards})
        return step(*arguments, **options)

    optimizer.step = exchange_and_step


def _describe_failed_build(error: Exception) -> str:
    reason = f"{type(error).__name__}: {one_line(str(error))[:120]}".rstrip(": ")
    return f"DeepSpeed's FusedAdam cannot be built ({reason}); torch's AdamW is used, to the same effect"
