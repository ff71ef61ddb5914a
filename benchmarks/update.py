"""What the update costs: against a bare DeepSpeed loop, against plain PyTorch, and packed against padded rows.

    OMP_NUM_THREADS=1 python benchmarks/update.py [--repeats 9] [--sequences 256] [--stages 1 2 3]

Every figure is a ratio of times taken in turns in this one process, so that a change in the machine's speed hits both
sides; printed are the median of the per-turn ratios and their quartiles. The model is the demo's: 0.86 M parameters,
Qwen3 type, 18 tokens, tied head. Targets: at most 1.05x bare DeepSpeed at each stage, at most 1.20x plain PyTorch at
stage 1, packed at least 1.4x faster per real token than micro-batches padded in arrival order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config.resolve import resolve

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")

import torch  # noqa: E402  the environment comes before anything that may import DeepSpeed
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from rlpost.config import Config  # noqa: E402
from rlpost.train.attention import describe_row, sequence_lengths  # noqa: E402
from rlpost.train.deepspeed_trainer import build_trainer  # noqa: E402
from rlpost.train.model import load_model  # noqa: E402
from rlpost.train.optimization import Ranks, adamw  # noqa: E402
from rlpost.train.process_group import init_process_group  # noqa: E402
from rlpost.train.zero import zero_config  # noqa: E402
from rlpost.types import PackedRow, TrainBatch  # noqa: E402

VOCAB = 18
BUDGET = 1024  # tokens per packed row, and per padded micro-batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    init_process_group(0, 1)
    sequences = heavy_tailed_sequences(arguments.sequences)
    batch = packed_batch(sequences)
    lengths = [len(s) for s in sequences]
    print(
        f"{len(lengths)} sequences, {sum(lengths)} tokens (mean {statistics.mean(lengths):.0f}, "
        f"median {statistics.median(lengths):.0f}, longest {max(lengths)}), {len(batch.rows)} packed rows, "
        f"{torch.get_num_threads()} threads, {arguments.repeats} turns"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_demo_model(Path(folder))
        for stage in arguments.stages:
            sides: dict[str, Callable[[], None]] = {
                "rlpost": trainer_update(folder, stage, batch),
                "bare": bare_deepspeed(folder, stage, packed_micro_batches(batch), own_attention=True),
                "stock": bare_deepspeed(folder, stage, packed_micro_batches(batch)),
            }
            if stage == 1:
                sides["torch"] = plain_torch(folder, packed_micro_batches(batch), own_attention=True)
                sides["stock torch"] = plain_torch(folder, packed_micro_batches(batch))
            times = take_turns(sides, arguments.repeats)
            report(f"update / bare DeepSpeed loop, stage {stage}", times["rlpost"], times["bare"], "<= 1.05")
            report("  the same over transformers' sdpa", times["rlpost"], times["stock"], "reported only")
            if stage == 1:
                report("update / plain PyTorch, stage 1", times["rlpost"], times["torch"], "<= 1.20")
                report("  the same over transformers' sdpa", times["rlpost"], times["stock torch"], "reported only")
        times = take_turns(
            {
                "packed": trainer_update(folder, 1, batch),
                "arrival": bare_deepspeed(folder, 1, padded_micro_batches(sequences)),
                "sorted": bare_deepspeed(folder, 1, padded_micro_batches(sorted(sequences, key=len))),
            },
            arguments.repeats,
        )
        report("padded in arrival order / packed, per real token", times["arrival"], times["packed"], ">= 1.4")
        report("padded, sorted by length / packed, per real token", times["sorted"], times["packed"], "reported only")


# ---- what is timed ----


def trainer_update(folder: str, stage: int, batch: TrainBatch) -> Callable[[], None]:
    cfg = Config()
    cfg.train.zero_stage = stage
    cfg = resolve(cfg, device="cpu", threads=1)
    trainer = build_trainer(cfg, model_folder=folder, total_optimizer_steps=10**6, needs_reference=False)

    def objective(logprobs: Any, entropy: Any, row: PackedRow, batch: TrainBatch) -> tuple[Any, dict[str, Any]]:
        loss = -(torch.from_numpy(row.advantages) * logprobs).sum() / batch.num_tokens
        return loss, {"loss/entropy": (entropy.detach().sum(), int(row.loss_mask.sum()))}

    def update() -> None:
        assert trainer.update(batch, objective).applied

    return update


MicroBatch = dict[str, Any]  # ids, positions [B, T]; attention_mask or None; advantages [B, T], 0 where no loss


def load(folder: str, own_attention: bool) -> Any:
    """With rlpost's attention the ratio shows what the trainer adds, and not what that attention saves."""
    if own_attention:
        return load_model(folder, dtype=torch.float32, device="cpu")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def bare_deepspeed(
    folder: str, stage: int, micro_batches: list[MicroBatch], own_attention: bool = False
) -> Callable[[], None]:
    """What one would write by hand: the Hugging Face model, a log softmax, backward per micro-batch, one step."""
    import deepspeed

    cfg = Config()
    cfg.train.zero_stage = stage
    cfg = resolve(cfg, device="cpu", threads=1)
    model = load(folder, own_attention)
    num_params = sum(p.numel() for p in model.parameters())
    settings = zero_config(cfg.train, dtype=torch.float32, num_params=num_params)
    engine = deepspeed.initialize(
        model=model, optimizer=adamw(model, train=cfg.train, device="cpu", ranks=Ranks(0, ("here",))), config=settings
    )[0]

    def update() -> None:
        engine.train()
        for micro_batch in micro_batches:
            engine.backward(plain_loss(engine, micro_batch, own_attention))
        engine.step()

    return update


def plain_torch(folder: str, micro_batches: list[MicroBatch], own_attention: bool = False) -> Callable[[], None]:
    model = load(folder, own_attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def update() -> None:
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            plain_loss(model, micro_batch, own_attention).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def plain_loss(model: Any, m: MicroBatch, own_attention: bool) -> torch.Tensor:
    output = model(
        input_ids=m["ids"],
        position_ids=m["positions"],
        attention_mask=m["attention_mask"],
        use_cache=False,
        **(describe_row(sequence_lengths(m["positions"][0].numpy()), m["ids"].device) if own_attention else {}),
    )
    logprobs = torch.log_softmax(output.logits[:, :-1], dim=-1).gather(2, m["ids"][:, 1:, None]).squeeze(2)
    return -(m["advantages"][:, 1:] * logprobs).sum() / m["num_tokens"]


# ---- the data ----


def heavy_tailed_sequences(count: int) -> list[np.ndarray]:
    """Lengths like the demo's after training: median about 45 tokens, a tail to 250 (log-normal, sigma 0.8)."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.8, 0.8, count), 12, 250).astype(int)
    return [random.integers(0, VOCAB, n) for n in lengths]


def packed_batch(sequences: Sequence[np.ndarray]) -> TrainBatch:
    """First fit: a sequence goes to the first row with room. The last three quarters of each are trained."""
    rows: list[list[np.ndarray]] = []
    for sequence in sequences:
        for row in rows:
            if sum(map(len, row)) + len(sequence) <= BUDGET:
                row.append(sequence)
                break
        else:
            rows.append([sequence])
    packed = []
    for row in rows:
        positions = np.concatenate([np.arange(len(s)) for s in row])
        mask = np.concatenate([trained(s) for s in row])
        packed.append(
            PackedRow(
                token_ids=np.concatenate(row),
                position_ids=positions,
                sequence_ids=np.cumsum(positions == 0) - 1,
                loss_mask=mask,
                rollout_logprobs=np.zeros(len(mask), np.float32),
                policy_versions=np.zeros(len(mask), np.int32),
                advantages=mask.astype(np.float32),
            )
        )
    num_tokens = sum(int(row.loss_mask.sum()) for row in packed)
    lengths = np.array([int(trained(s).sum()) for s in sequences])
    return TrainBatch(
        rows=tuple(packed),
        num_tokens=num_tokens,
        num_sequences=len(sequences),
        sequence_lengths=lengths,
        policy_version=0,
    )


def trained(sequence: np.ndarray) -> np.ndarray:
    return np.arange(len(sequence)) >= len(sequence) // 4


def packed_micro_batches(batch: TrainBatch) -> list[MicroBatch]:
    return [
        {
            "ids": torch.from_numpy(row.token_ids)[None],
            "positions": torch.from_numpy(row.position_ids)[None],
            "attention_mask": None,
            "advantages": torch.from_numpy(row.advantages)[None],
            "num_tokens": batch.num_tokens,
        }
        for row in batch.rows
    ]


def padded_micro_batches(sequences: Sequence[np.ndarray]) -> list[MicroBatch]:
    """In the order given, each padded to its longest member; members x longest stays within the token budget."""
    groups: list[list[np.ndarray]] = [[]]
    for sequence in sequences:
        longest = max([len(sequence), *map(len, groups[-1])])
        if groups[-1] and (len(groups[-1]) + 1) * longest > BUDGET:
            groups.append([])
        groups[-1].append(sequence)
    num_tokens = sum(int(trained(s).sum()) for s in sequences)
    result = []
    for group in groups:
        shape = (len(group), max(map(len, group)))
        ids, mask, advantages = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for i, sequence in enumerate(group):
            n = len(sequence)
            ids[i, :n], mask[i, :n], advantages[i, :n] = sequence, 1, trained(sequence)
        result.append(
            {
                "ids": torch.from_numpy(ids),
                "positions": torch.arange(shape[1]).expand(shape),
                "attention_mask": torch.from_numpy(mask),
                "advantages": torch.from_numpy(advantages),
                "num_tokens": num_tokens,
            }
        )
    return result


def save_demo_model(folder: Path) -> None:
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder)


# ---- timing ----


def take_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side per turn; every turn runs all sides, in an order that is reversed each time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 2):  # the first two warm up
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def report(what: str, numerator: list[float], denominator: list[float], target: str) -> None:
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(
        f"{what}: {statistics.median(ratios):.3f}x (quartiles {low:.3f} to {high:.3f}; "
        f"{statistics.median(numerator):.3f} s over {statistics.median(denominator):.3f} s; target {target})",
        flush=True,
    )


if __name__ == "__main__":
    main()
