"""Stage 5: engine and trainer take turns on one GPU, twice: seconds and memory of each move, and no bit is lost.

The largest shape that fits. Publications compare every weight bit for bit; beyond that, the engine's weights stay at
their addresses (CUDA graphs hold them), and ZeRO's states come back from host memory with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.gpu.random_policy import (
    GB,
    Need,
    build_random_trainer,
    choose_size,
    packed_batch,
    prepare,
    random_tokens,
    synchronize,
    used_gb,
)
from benchmarks.gpu.record import Record, Settings
from benchmarks.gpu.states import state_sums
from rlpost.workers.canary import CanarySequence
from rlpost.workers.colocation import SharedDevice


def run(settings: Settings, record: Record) -> None:
    # The step's peak and the engine's weights on the device; in host memory what sleeps, some of it rounded up.
    need = Need(bytes_per_param=28, extra_bytes=lambda size: 6 * GB, host_bytes_per_param=24)
    size = choose_size(settings, record, need)
    with TemporaryDirectory() as folder:
        take_turns(settings, record, size, Path(folder))


def take_turns(settings: Settings, record: Record, size: str, folder: Path) -> None:
    length, slots = (64, 4) if settings.small else (1024, 64)
    policy = prepare(
        settings,
        size,
        folder,
        engine={"max_slots": slots, "enforce_eager": settings.small or None},
        train={"gradient_checkpointing": not settings.small, "lr": 1e-3},
    )
    moves = Moves(record)
    with moves.measured("trainer"):
        trainer = build_random_trainer(policy)
    with moves.measured("trainer_sleep"):
        trainer.sleep()
    from rlpost.engine.vllm import build_engine

    with moves.measured("engine"):
        engine = build_engine(policy.cfg, model_folder=policy.folder, max_model_len=length)
    canary = [random_tokens(length // 2, policy.vocab_size, seed) for seed in range(4)]
    device = SharedDevice(engine, trainer, canary=[CanarySequence(ids, 1) for ids in canary], threshold=np.inf)
    publish(moves, device, 0)
    addresses = engine_addresses(engine)
    before = engine.score(canary)
    with moves.measured("hand_over_to_trainer"), device.training():
        pass
    with moves.measured("update", peak=True):
        update(trainer, policy.vocab_size, length)
    check_states(record, moves, trainer)
    publish(moves, device, 1)
    record.require(engine_addresses(engine) == addresses, "the engine's weights have other addresses")
    moved = max(float(np.abs(a - b).max()) for a, b in zip(before, engine.score(canary), strict=True))
    record.note(logprobs_moved_nats=moved)
    record.require(moved > 0, "the second publication changed nothing: the engine has the weights of the first")


class Moves:
    """Seconds of each move, and the GPU's memory after it."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @contextmanager
    def measured(self, name: str, *, peak: bool = False) -> Iterator[None]:
        import torch

        on_gpu = torch.cuda.is_available()
        if peak and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        synchronize()
        self.record.note(**{f"{name}_s": time.perf_counter() - start})
        if on_gpu:
            self.record.note(**{f"{name}_used_gb": used_gb()})
            if peak:
                self.record.note(**{f"{name}_peak_gb": torch.cuda.max_memory_allocated() / GB})


def publish(moves: Moves, device: SharedDevice, version: int) -> None:
    """Raises RunError if a weight differs afterwards."""
    with moves.measured(f"publish{version}"):
        publication = device.publish_weights(version)
    moves.record.note(
        **{
            f"copy{version}_gb_s": publication.num_bytes / publication.load_s / GB,
            f"fingerprint{version}_s": publication.fingerprint_s,
            f"canary{version}_s": publication.canary_s,
            f"canary{version}_mean_nats": publication.canary_mean,
            f"canary{version}_max_nats": publication.canary_max,
        }
    )


def update(trainer: Any, vocab_size: int, length: int) -> None:
    batch = packed_batch([[length] * 2] * 2, vocab_size)
    result = trainer.update(batch, negative_logprob)
    assert result.applied, "the optimizer step was dropped"


def negative_logprob(logprobs: Any, entropy: Any, row: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """An ``Objective``: the mean over the batch's trained tokens, which are the only ones with a gradient."""
    import torch

    mask = torch.from_numpy(row.loss_mask).to(logprobs.device)
    return -(logprobs * mask).sum() / batch.num_tokens, {}


def check_states(record: Record, moves: Moves, trainer: Any) -> None:
    """A second trip to host memory and back, with checksums before and after."""
    before = state_sums(trainer)
    used = used_gb()
    with moves.measured("states_off"):
        trainer.sleep()
    gone = used - used_gb()
    with moves.measured("states_on"):
        trainer.wake()
    record.note(states_off_gb=gone)
    record.require(state_sums(trainer) == before, "ZeRO's states have other bits after a sleep")


def engine_addresses(engine: Any) -> dict[str, int]:
    return {name: int(engine.read_weight(name).data_ptr()) for name in engine.weight_names}
