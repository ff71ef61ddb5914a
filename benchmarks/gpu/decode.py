"""Stage 7: decoding with 64, 128 and 256 slots behind prompts of 3,000 tokens, and rlpost's own share of a step.

``collect`` as a run calls it, groups of eight that share a prompt, every response as long as the others. Counted are
the iterations that only decode. rlpost's own time is what ``collect`` spends outside the engine, and what reading the
engine's output takes inside of ``VLLMEngine.step``. Responses are short here, so the cost of beginning and ending one
weighs more than in a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu.random_policy import (
    GB,
    NORM_FACTOR,
    Need,
    Policy,
    choose_size,
    free_memory,
    prepare,
    random_tokens,
    shape_of,
)
from benchmarks.gpu.record import Record, Settings
from rlpost.models.shape import kv_bytes
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.types import Prompt

GROUP = 8
LIMIT = 0.05  # rlpost's share of a step, at 4B


def run(settings: Settings, record: Record, which: str) -> None:
    prompt_tokens, new = (48, 8) if settings.small else (3072, 64)
    slots = (8, 16) if settings.small else (64, 128, 256)
    # A group's samples share the prompt; each has blocks of its own (of 128 tokens on a CPU) for the rest.
    num_tokens = max(slots) // GROUP * prompt_tokens + max(slots) * (256 if settings.small else new + 64)

    def room(size: str) -> int:
        return kv_bytes(shape_of(size), num_tokens=num_tokens, dtype=settings.dtype)

    # Weights twice while the engine is given its own; graphs and temporary buffers.
    need = Need(bytes_per_param=4, extra_bytes=lambda size: room(size) + 3 * GB)
    size = choose_size(settings, record, need, which)
    engine = {"max_slots": max(slots), "kv_cache_bytes": room(size), "enforce_eager": settings.small or None}
    with TemporaryDirectory() as folder:
        policy = prepare(settings, size, Path(folder), engine=engine)
        decode(record, policy, slots, prompt_tokens, new)


def decode(record: Record, policy: Policy, slots: tuple[int, ...], prompt_tokens: int, new: int) -> None:
    from rlpost.engine.vllm import build_engine

    engine = build_engine(policy.cfg, model_folder=policy.folder, max_model_len=prompt_tokens + new)
    weights_of(policy, engine)
    for number in (slots[0], *slots):  # the first warms up
        with read_timed() as read_s:
            stats = collect_once(engine, policy, number, prompt_tokens, new)
        work = stats.work
        decoding = [(s, r) for s, r, p in zip(work.step_s, work.running, work.prefill, strict=True) if not p]
        if not decoding:
            continue
        step_s = float(np.median([s for s, _ in decoding]))
        own_s = (work.own_s + sum(read_s)) / len(work.step_s)
        share = own_s / step_s
        record.note(
            **{
                f"slots{number}_tok_s": float(np.median([r / s for s, r in decoding])),
                f"slots{number}_step_ms": 1e3 * step_s,
                f"slots{number}_rlpost_host_ms": 1e3 * own_s,
                f"slots{number}_rlpost_share": share,
            }
        )
        if policy.size == "4b":
            record.require(share < LIMIT, f"{number} slots: rlpost's share of a step is {share:.1%}")
    record.require(bool(stats.num_generated), "nothing was generated")


def weights_of(policy: Policy, engine: Any) -> None:
    """Random weights from a model that is forgotten again: dummies are nearly zero, and every token would be equal."""
    import torch

    from rlpost.train.model import DTYPES, load_model
    from rlpost.train.weights import iter_buckets, own_weights
    from rlpost.workers.publication import BUCKET_BYTES

    torch.manual_seed(0)
    with torch.device(policy.cfg.device):
        dtype = DTYPES[policy.cfg.model.dtype]
        model: Any = load_model(policy.folder, dtype=dtype, device=policy.cfg.device, init="random")
    with torch.no_grad():
        model.model.norm.weight.fill_(NORM_FACTOR)
        engine.load_weights(iter_buckets(own_weights(model), max_bytes=BUCKET_BYTES, partitioned=False))
    del model
    free_memory()


def collect_once(engine: Any, policy: Policy, slots: int, prompt_tokens: int, new: int) -> Any:
    """One step of a synchronous rollout that fills ``slots`` once."""
    from rlpost.engine.protocol import SamplingSettings
    from rlpost.models.tokenizer import load_tokenizer
    from rlpost.rewards.scoring import InlineScorer, make_decode

    scorer = InlineScorer(response_length, make_decode(load_tokenizer(policy.folder), ()))
    settings = CollectSettings(
        max_in_flight=slots,
        max_response_tokens=new,
        sampling=SamplingSettings(),
        seed=slots,
        max_filtered_groups=1,
        reject=lambda group: None,
    )
    strategy = RolloutStrategy(groups_per_step=slots // GROUP, samples_per_group=GROUP)
    stats = collect(engine, RolloutBuffer(strategy), prompts_of(policy, slots, prompt_tokens), scorer, settings, step=0)
    scorer.close()
    return stats


def prompts_of(policy: Policy, slots: int, num_tokens: int) -> Iterator[Prompt]:
    for number in range(slots // GROUP):
        ids = random_tokens(num_tokens, policy.vocab_size, 1000 * slots + number)
        yield Prompt(uid=f"{slots}:{number}", token_ids=ids, text="")


def response_length(response: str, **columns: Any) -> float:
    return float(len(response))


@contextmanager
def read_timed() -> Iterator[list[float]]:
    """Seconds of each reading of vLLM's output; the engine counts it as its own time, but it is rlpost's code."""
    from rlpost.engine import vllm

    seconds: list[float] = []
    read_deltas = vllm.read_deltas

    def timed(outputs: Any) -> Any:
        start = time.perf_counter()
        deltas = read_deltas(outputs)
        seconds.append(time.perf_counter() - start)
        return deltas

    with patch.object(vllm, "read_deltas", timed):
        yield seconds
