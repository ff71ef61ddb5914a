"""One of two ranks, started by test_two_ranks.py as a process of its own: PROGRAM, RANK, the folder with its orders.

Rows are divided by ``workers.cluster.trainer_group``, as in a run on a cluster: every rank makes the same calls of a
``TrainerGroup``.
"""

from __future__ import annotations

import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlpost.config.resolve import resolve

WORLD = 2
STAGES = (1, 2, 3)


def main(program: str, rank: int, folder: Path) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    from rlpost.train.process_group import init_process_group

    store = dist.FileStore(str(folder / "store"), WORLD)
    store.set_timeout(timedelta(minutes=3))
    init_process_group(rank, WORLD, store, "cpu")
    run = {
        "parity": five_updates,
        "bfloat16": five_updates_in_bfloat16,
        "machines": five_updates_on_machines,
        "durable": updates_and_files,
    }[program]
    torch.save({stage: run(rank, folder, stage) for stage in STAGES}, folder / f"results-{rank}.pt")
    dist.destroy_process_group()


def five_updates(rank: int, folder: Path, stage: int) -> dict[str, Any]:
    from tests.train import parity

    cfg = parity.config(stage)
    trainer = build(rank, folder, cfg)
    result = parity.train(trainer, cfg, parity.Spmd(trainer), world=WORLD)
    trainer.close()
    return result


def five_updates_in_bfloat16(rank: int, folder: Path, stage: int) -> dict[str, Any]:
    """Gradients are summed in float32, from stage 2 on; between the ranks they travel in bfloat16."""
    from tests.train import parity

    cfg = parity.config(stage)
    cfg.model.dtype = "bfloat16"
    trainer = build(rank, folder, cfg)
    result = parity.train(trainer, cfg, parity.Spmd(trainer), world=WORLD)
    trainer.close()
    return result


def five_updates_on_machines(rank: int, folder: Path, stage: int) -> dict[str, Any]:
    """The same, each rank taken for a machine of its own: ZeRO within it, the mean over machines by exchange."""
    from tests.train import parity

    cfg = parity.config(stage)
    cfg.train.gradient_reduction = {"_target_": "tests.train.machines.mean_over_machines"}
    trainer = build(rank, folder, cfg)
    result = parity.train(trainer, cfg, parity.Spmd(trainer), world=WORLD)
    trainer.close()
    return result


def updates_and_files(rank: int, folder: Path, stage: int) -> dict[str, Any]:
    """Three updates of five rows, one that is NaN on rank 1 alone, a checkpoint, one more update twice."""
    import torch

    from rlpost.workers.cluster.trainer_group import TrainerGroup
    from tests.train import cases, parity

    def objective(logprobs, entropy, row, batch):  # type: ignore[no-untyped-def]
        loss, metrics = cases.objective(logprobs, entropy, row, batch)
        return loss, {**metrics, "loss/rank/max": (float(rank), 1)}

    def broken_on_rank_1(logprobs, entropy, row, batch):  # type: ignore[no-untyped-def]
        loss, metrics = cases.objective(logprobs, entropy, row, batch)
        return (loss + math.nan if rank == 1 else loss), metrics

    def batch_of(step: int):  # type: ignore[no-untyped-def]
        return cases.packed_batch(step, count=10, per_row=2)

    def ranked(trainer: Any) -> TrainerGroup:
        return TrainerGroup(parity.Spmd(trainer), world=WORLD, hidden_size=parity.HIDDEN_SIZE)

    first = build(rank, folder, cases.config(stage))
    trainer = ranked(first)
    applied = [trainer.update(batch_of(step), objective) for step in range(3)]
    weights = cases.weights_of(first)
    skipped = trainer.update(batch_of(3), broken_on_rank_1)
    unchanged = cases.largest_difference(cases.weights_of(first), weights) == 0.0
    rows = batch_of(5).rows
    logprobs, reference = trainer.logprobs(rows), trainer.logprobs(rows, reference=True)
    # Rank 0 asks for four sequences, rank 1 for one: the passes must still be equally many.
    scores = first.score([s["token_ids"] for s in cases.sequences(9, 4 if rank == 0 else 1)])
    trainer.save(folder / f"checkpoint-{stage}")
    trainer.save_config(folder / f"config-{stage}")
    trainer.export(folder / f"export-{stage}")
    last = trainer.update(batch_of(5), objective)
    second = build(rank, folder, cases.config(stage))
    resumed = ranked(second)
    resumed.load(folder / f"checkpoint-{stage}")
    again = resumed.update(batch_of(5), objective)
    identical = last == again and cases.largest_difference(cases.weights_of(first), cases.weights_of(second)) == 0.0
    first.close()
    second.close()
    return {
        "losses": [r.loss for r in applied],
        "grad_norms": [r.grad_norm for r in applied],
        "metrics": [dict(r.metrics) for r in applied],
        "weights": {name: tensor.to(torch.float32) for name, tensor in weights.items()},
        "nan_skipped": not skipped.applied and unchanged,
        "resumed_identical": identical,
        "logprobs": logprobs,
        "reference": reference,
        "scores": scores,
    }


def build(rank: int, folder: Path, cfg: Any):  # type: ignore[no-untyped-def]
    from rlpost.train.deepspeed_trainer import build_trainer

    return build_trainer(
        resolve(cfg, device="cpu", threads=1),
        model_folder=folder / "model",
        total_optimizer_steps=10,
        needs_reference=True,
        rank=rank,
        world=WORLD,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
