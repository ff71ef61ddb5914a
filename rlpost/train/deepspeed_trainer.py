"""The policy under DeepSpeed ZeRO 1 to 3: updates, logprobs, weights to publish, checkpoints.

Owns the engine, the optimizer and its step count, and the frozen reference. Never sees groups, rewards or the
inference engine. Built by ``build_trainer``, which start-up calls before the inference engine is built; the loop is its
caller. With several ranks every method is collective, and each rank passes its own rows (any number of them).
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from rlpost.algos.batch import pack
from rlpost.config import Config, TrainConfig, rule_of
from rlpost.config.rules import check_value
from rlpost.errors import RunError, explain
from rlpost.train import metric_sums
from rlpost.train.attention import sequence_lengths
from rlpost.train.checkpoint_layout import DEEPSPEED, check_layout, describe, write_layout
from rlpost.train.forward import PolicyModule, trainable_positions
from rlpost.train.lr_schedule import lr_at
from rlpost.train.model import DTYPES, load_model
from rlpost.train.offload import FrozenModule, StatesOffload
from rlpost.train.optimization import Ranks, choose_optimization, install_exchange
from rlpost.train.process_group import init_process_group
from rlpost.train.protocol import Objective, UpdateResult
from rlpost.train.weights import NamedWeights, full_state_dict, iter_buckets, own_weights
from rlpost.train.zero import zero_config
from rlpost.types import PackedRow, TrainBatch

_EXPORT_BUCKET_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """One packed row for the forward pass; ``positions`` are those whose logprobs are wanted."""

    token_ids: np.ndarray  # i64[L]
    position_ids: np.ndarray  # i64[L]
    positions: np.ndarray  # i64[N]


# What a rank runs when it has fewer rows than another: it must make the same collective calls.
_PADDING = _Inputs(token_ids=np.zeros(2, np.int64), position_ids=np.arange(2), positions=np.ones(1, np.int64))


def build_trainer(
    cfg: Config,
    *,
    model_folder: Path | str,
    total_optimizer_steps: int,
    needs_reference: bool,
    rank: int = 0,
    world: int = 1,
    store: Any = None,
    init: str = "pretrained",
    weights: NamedWeights = own_weights,
) -> DeepSpeedTrainer:
    """The trainer of one rank, its process group started if it is not yet (see ``train.process_group``).

    cfg is resolved. total_optimizer_steps: what the learning-rate schedule spans. The reference is the
    model as loaded here and is not loaded at all unless needed. init ``random``: weights from the config and
    ``cfg.seed`` instead of files. Every rank loads the whole model into host memory; ZeRO-3 partitions it from there.
    Raises ConfigError for a stage that is refused, ModelError for a model that cannot be used.
    """
    check_value("train.zero_stage", cfg.train.zero_stage, rule_of(TrainConfig, "zero_stage"))
    device, dtype = cfg.device, DTYPES[cfg.model.dtype]
    init_process_group(rank, world, store, device)
    assert cfg.train.max_row_tokens is not None and cfg.train.zero_stage is not None, "resolved"
    if init == "random":
        torch.manual_seed(cfg.seed)
    load = partial(load_model, model_folder, dtype=dtype, device=device, init=init)
    policy = PolicyModule(load(), chunk_tokens=cfg.train.logprob_chunk_tokens)
    reference = None
    if needs_reference:
        reference = PolicyModule(load(), chunk_tokens=cfg.train.logprob_chunk_tokens)
        reference.load_state_dict(policy.state_dict())  # the same weights also where they are random
        reference.eval().requires_grad_(False)
    if cfg.train.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return DeepSpeedTrainer(
        engine=_initialize(policy, cfg, dtype, device),
        reference=reference,
        device=device,
        temperature=cfg.rollout.temperature,
        max_row_tokens=cfg.train.max_row_tokens,
        sleeps=_sleeps(cfg),
        lr_of_step=partial(
            lr_at,
            peak=cfg.train.lr,
            schedule=cfg.train.schedule,
            warmup_steps=cfg.train.warmup_steps,
            total_steps=total_optimizer_steps,
            final_share=cfg.train.final_lr_share,
        ),
        weights=weights,
    )


class DeepSpeedTrainer:
    """Implements ``train.protocol.PolicyTrainer`` for one rank of any number."""

    def __init__(
        self,
        *,
        engine: Any,
        reference: PolicyModule | None,
        device: str,
        temperature: float,
        max_row_tokens: int,
        sleeps: bool,
        lr_of_step: Callable[[int], float],
        weights: NamedWeights = own_weights,
    ) -> None:
        """``weights``: what is published and exported of the language model, by name."""
        self.engine = engine
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.optimizer_step = 0  # optimizer updates applied so far; the schedule counts these
        self._device = torch.device(device) if device == "cpu" else engine.device
        self._temperature = temperature
        self._max_row_tokens = max_row_tokens
        self._states = StatesOffload(engine) if sleeps else None
        self._lr_of_step = lr_of_step
        self._weights = weights
        self.reference = None if reference is None else FrozenModule(reference, self._device)
        self._stage: int = engine.zero_optimization_stage()

    @property
    def lm(self) -> Any:
        return self.engine.module.lm

    # ---- updates ----

    def update(self, batch: TrainBatch, objective: Objective) -> UpdateResult:
        """One optimizer step over the batch's rows; see ``PolicyTrainer.update``.

        ``batch`` holds this rank's rows and the denominators of the global batch; loss, metrics and gradient are
        those of the global batch. A row without a trainable token is left out. A loss or gradient that is not finite
        on any rank applies nothing: parameters, optimizer states and schedule stay as they were (``applied=False``).
        A batch without a trainable token (``num_tokens == 0``) runs nothing and applies nothing either: a step of
        zero gradients would still move the weights by AdamW's momentum.
        """
        lr = self._lr_of_step(self.optimizer_step)
        if batch.num_tokens == 0:
            return UpdateResult(applied=False, loss=0.0, grad_norm=0.0, lr=lr, metrics={}, num_tokens=0)
        self.engine.train()
        losses: list[torch.Tensor] = []
        row_metrics: list[Mapping[str, tuple[Any, Any]]] = []
        rows = self._padded([row for row in batch.rows if len(trainable_positions(row))])
        assert rows, "a batch with trainable tokens has rows with trainable positions"
        for row in rows:
            if row is None:
                self._backward_times(0.0)
                continue
            logprobs, entropy = self._forward(self.engine, _inputs_of(row), self._temperature)
            loss, metrics = objective(logprobs, entropy, row, batch)
            self.engine.backward(loss * self.world)  # DeepSpeed averages over ranks; the loss is already a share
            losses.append(loss.detach())
            row_metrics.append(metrics)
        loss_sum = self._sum_over_ranks(losses)
        if not math.isfinite(loss_sum):
            self._backward_times(math.nan)
        applied, grad_norm = self._optimizer_step(lr)
        sums = self._merge_over_ranks(metric_sums.merge(metric_sums.to_floats(row_metrics)))
        return UpdateResult(
            applied=applied,
            loss=loss_sum,
            grad_norm=grad_norm,
            lr=lr,
            metrics=metric_sums.values(sums),
            num_tokens=batch.num_tokens,
        )

    def _optimizer_step(self, lr: float) -> tuple[bool, float]:
        """(applied, gradient norm before clipping). DeepSpeed itself drops gradients whose norm is not finite."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        self.optimizer_step += applied
        return applied, float(self.engine.get_global_grad_norm()) if applied else math.nan

    def _backward_times(self, factor: float) -> None:
        """A backward pass of padding: 0 adds nothing to the gradient, NaN makes DeepSpeed drop all of it.

        The NaN is needed where a loss is not finite but its gradient is: DeepSpeed looks at gradients only.
        """
        logprobs, _ = self._forward(self.engine, _PADDING, self._temperature)
        self.engine.backward(logprobs.sum() * factor)

    # ---- logprobs ----

    def logprobs(self, rows: Sequence[PackedRow], *, reference: bool = False) -> list[np.ndarray]:
        """f32[L] per row of its trainable tokens, 0 elsewhere, at the rollout temperature and without gradient."""
        return self._evaluate([_inputs_of(row) for row in rows], self._temperature, reference=reference)

    def score(self, sequences: Sequence[Any]) -> list[np.ndarray]:
        """f32[len - 1] per sequence: log pi(x_t | x_<t) at temperature 1, for t = 1 .. len - 1."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        rows = pack([len(array) for array in arrays], self._max_row_tokens)
        scored = self._evaluate([_inputs_of_sequences([arrays[i] for i in row]) for row in rows], 1.0)
        result: list[np.ndarray] = [np.zeros(0, np.float32)] * len(arrays)
        for row, logprobs in zip(rows, scored, strict=True):
            ends = np.cumsum([len(arrays[i]) for i in row])
            for index, part in zip(row, np.split(logprobs, ends[:-1]), strict=True):
                result[index] = part[1:]
        return result

    @torch.no_grad()
    def _evaluate(self, rows: list[_Inputs], temperature: float, *, reference: bool = False) -> list[np.ndarray]:
        if reference:
            assert self.reference is not None, "built without a reference: needs_reference was False"
            with self.reference.on_device() as module:  # whole on every rank, without collective calls
                return [self._forward(module, row, temperature)[0].cpu().numpy() for row in rows]
        self.engine.eval()
        padded = self._padded(rows)
        results = [self._forward(self.engine, row or _PADDING, temperature)[0].cpu().numpy() for row in padded]
        return results[: len(rows)]

    def _forward(self, module: Any, row: _Inputs, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = (row.token_ids, row.position_ids, row.positions)
        lengths = sequence_lengths(row.position_ids)  # known here: the device would have to be awaited
        logprobs, entropy = module(*(self._tensor(array) for array in arrays), temperature, lengths).unbind(0)
        return logprobs, entropy

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.require(array, np.int64, ["C", "W"])).to(self._device, non_blocking=True)

    # ---- weights and memory ----

    def iter_weights(self, max_bytes: int) -> Iterator[list[tuple[str, Any]]]:
        """See ``train.weights.iter_buckets``; the trainer must be awake."""
        return iter_buckets(self._weights(self.lm), max_bytes=max_bytes, partitioned=self._stage == 3)

    def sleep(self) -> None:
        """Move ZeRO's states to host memory (GPU); on a CPU there is nothing to do."""
        if self._states is not None:
            self._states.offload()

    def wake(self) -> None:
        if self._states is not None:
            self._states.reload()

    # ---- durable state ----

    def save(self, folder: Path) -> None:
        """Everything an update depends on: weights, optimizer, step count, torch's random states of every rank.

        Returns when all ranks have written; making the folder durable and visible is the caller's business.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {"rlpost": {"optimizer_step": self.optimizer_step}}  # nested: DeepSpeed merges it into its own keys
        self.engine.save_checkpoint(str(folder), tag=DEEPSPEED, client_state=state, save_latest=False)
        torch.save(_random_state(), folder / f"random-state-rank{self.rank}.pt")
        if self.rank == 0:
            write_layout(folder, self._layout())
        dist.barrier()

    def load(self, folder: Path) -> None:
        """The reverse of :meth:`save`; training goes on bit for bit as if it had not stopped.

        Raises RunError when the checkpoint is not there or was written by another number of ranks or ZeRO stage.
        """
        what = "trainer checkpoint"
        check_layout(folder, self._layout())
        try:
            loaded, state = self.engine.load_checkpoint(str(folder), tag=DEEPSPEED)
        except Exception as error:  # a cut file, or another model's: torch and DeepSpeed raise whatever they meet
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            do = "use an older checkpoint, and the model it was made with"
            raise RunError(explain(what, f"{folder} ({reason})", "whole files of this model", do)) from error
        if loaded is None:
            raise RunError(explain(what, str(folder), f"DeepSpeed's files in {DEEPSPEED}/", "use an older checkpoint"))
        self.optimizer_step = state["rlpost"]["optimizer_step"]
        _restore_random_state(torch.load(folder / f"random-state-rank{self.rank}.pt", weights_only=True))

    def _layout(self) -> dict[str, Any]:
        dtype = str(self.lm.dtype).removeprefix("torch.")
        return describe(world=self.world, zero_stage=self._stage, dtype=dtype)

    def export(self, folder: Path) -> None:
        """A Hugging Face folder (config and safetensors in the training dtype), written by rank 0.

        Raises RunError where the disk takes no more.
        """
        state = full_state_dict(
            self._weights(self.lm), max_bytes=_EXPORT_BUCKET_BYTES, partitioned=self._stage == 3, keep=self.rank == 0
        )
        if self.rank == 0:
            try:
                self.lm.save_pretrained(folder, state_dict=state)
            except SafetensorError as error:  # its form of an OSError, without a number
                do = f"{str(error).splitlines()[0]}; free space, run again to go on from the last checkpoint"
                raise RunError(explain("model folder", str(folder), "a disk with room", do)) from error
        dist.barrier()

    def save_config(self, folder: Path) -> None:
        """config.json and generation_config.json, by rank 0: what makes a model of a checkpoint's weights."""
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.lm.config.save_pretrained(folder)
            self.lm.generation_config.save_pretrained(folder)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers. The process group stays: start-up made it and ends it."""
        self.engine.destroy()

    # ---- ranks ----

    def _padded(self, rows: Sequence[Any]) -> list[Any]:
        """The rows and then None until every rank has as many: ZeRO-2 and -3 exchange data in every pass."""
        longest = len(rows)
        if self.world > 1:
            count = torch.tensor(longest, device=self._device)
            dist.all_reduce(count, op=dist.ReduceOp.MAX)
            longest = int(count)
        return [*rows, *[None] * (longest - len(rows))]

    def _sum_over_ranks(self, losses: list[torch.Tensor]) -> float:
        total = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64)
        if self.world > 1:
            total = total.to(self._device)
            dist.all_reduce(total)
        return float(total)

    def _merge_over_ranks(self, sums: metric_sums.Sums) -> metric_sums.Sums:
        if self.world == 1:
            return sums
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, sums)
        return metric_sums.merge(gathered)


def _sleeps(cfg: Config) -> bool:
    """Whether ZeRO's states leave the device while the engine generates."""
    on_gpu, stays = cfg.device != "cpu", cfg.engine.sleep == "never"
    return on_gpu and not stays and cfg.train.sleep_offload and not cfg.train.offload_params


def _initialize(policy: PolicyModule, cfg: Config, dtype: torch.dtype, device: str) -> Any:
    import deepspeed

    num_params = sum(p.numel() for p in policy.parameters())
    chosen = choose_optimization(policy, cfg.train, device=device, ranks=_find_ranks())
    deepspeed.utils.groups.mpu = None  # a global that an earlier engine of this process may have left
    engine = deepspeed.initialize(
        model=policy,
        optimizer=chosen.optimizer,
        config=zero_config(cfg.train, dtype=dtype, num_params=num_params),
        mpu=chosen.reduction.groups,
    )[0]
    install_exchange(engine, chosen.reduction)
    return engine


def _find_ranks() -> Ranks:
    """Which ranks there are, and on which machines; all ranks call it."""
    machines: list[Any] = [socket.gethostname()] * dist.get_world_size()
    if len(machines) > 1:
        dist.all_gather_object(machines, socket.gethostname())
    return Ranks(rank=dist.get_rank(), machines=tuple(machines))


def _inputs_of(row: PackedRow) -> _Inputs:
    return _Inputs(token_ids=row.token_ids, position_ids=row.position_ids, positions=trainable_positions(row))


def _inputs_of_sequences(sequences: list[np.ndarray]) -> _Inputs:
    position_ids = np.concatenate([np.arange(len(s)) for s in sequences])
    return _Inputs(
        token_ids=np.concatenate(sequences), position_ids=position_ids, positions=np.flatnonzero(position_ids > 0)
    )


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
