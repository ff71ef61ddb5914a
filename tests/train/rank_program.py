"""One of two ranks, started by test_two_ranks.py as a process of its own: RANK, then the folder with its orders."""

from __future__ import annotations

import math
import os
import sys
from datetime import timedelta
from pathlib import Path

WORLD = 2


def main(rank: int, folder: Path) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    from rlpost.train.process_group import init_process_group

    store = dist.FileStore(str(folder / "store"), WORLD)
    store.set_timeout(timedelta(minutes=3))
    init_process_group(rank, WORLD, store, "cpu")
    results = {stage: run_stage(rank, folder, stage) for stage in (1, 2, 3)}
    torch.save(results, folder / f"results-{rank}.pt")
    dist.destroy_process_group()


def run_stage(rank: int, folder: Path, stage: int) -> dict:
    """Three updates with unequal rows, one that is NaN on rank 1 alone, a checkpoint, one more update twice."""
    import torch

    from tests.train import cases

    def objective(logprobs, entropy, row, batch):  # type: ignore[no-untyped-def]
        loss, metrics = cases.objective(logprobs, entropy, row, batch)
        return loss, {**metrics, "loss/rank/max": (float(rank), 1)}

    def broken_on_rank_1(logprobs, entropy, row, batch):  # type: ignore[no-untyped-def]
        loss, metrics = cases.objective(logprobs, entropy, row, batch)
        return (loss + math.nan if rank == 1 else loss), metrics

    trainer = build(rank, folder, stage)
    applied = [trainer.update(share(rank, step), objective) for step in range(3)]
    weights = cases.weights_of(trainer)
    skipped = trainer.update(share(rank, 3), broken_on_rank_1)
    unchanged = cases.largest_difference(cases.weights_of(trainer), weights) == 0.0
    # Rank 0 asks for four rows, rank 1 for one: the passes must still be equally many.
    batch = share(rank, 5)
    logprobs, reference = trainer.logprobs(batch.rows), trainer.logprobs(batch.rows, reference=True)
    scores = trainer.score([s["token_ids"] for s in cases.sequences(9, 4 if rank == 0 else 1)])
    trainer.save(folder / f"checkpoint-{stage}")
    trainer.save_config(folder / f"config-{stage}")
    trainer.export(folder / f"export-{stage}")
    last = trainer.update(share(rank, 5), objective)
    resumed = build(rank, folder, stage)
    resumed.load(folder / f"checkpoint-{stage}")
    again = resumed.update(share(rank, 5), objective)
    identical = last == again and cases.largest_difference(cases.weights_of(trainer), cases.weights_of(resumed)) == 0.0
    trainer.close()
    resumed.close()
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


def build(rank: int, folder: Path, stage: int):  # type: ignore[no-untyped-def]
    from rlpost.train.deepspeed_trainer import build_trainer
    from tests.train import cases

    return build_trainer(
        cases.config(stage),
        model_folder=folder / "model",
        device="cpu",
        total_optimizer_steps=10,
        needs_reference=True,
        rank=rank,
        world=WORLD,
    )


def share(rank: int, step: int):  # type: ignore[no-untyped-def]
    """Of five rows rank 0 takes four and rank 1 the last, with the denominators of the whole."""
    from dataclasses import replace

    from tests.train import cases

    batch = cases.packed_batch(step, count=10, per_row=2)
    return replace(batch, rows=batch.rows[:4] if rank == 0 else batch.rows[4:])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
