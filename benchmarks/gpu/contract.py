"""Stage 2: engine and trainer compute one policy, in the dtype that a GPU trains in.

Logprobs of the rollout against the engine's own scoring of the same tokens, and that against the trainer's; seeds; a
greedy response that is aborted and resumed; a prompt whose cached prefix belongs to older weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.gpu.random_policy import build_random_trainer, prepare, random_tokens
from benchmarks.gpu.record import Record, Settings
from benchmarks.gpu.requests import GREEDY, SAMPLED, Responses, generate, make_requests
from rlpost.workers.canary import CanarySequence
from rlpost.workers.colocation import SharedDevice

LIMIT = {"bfloat16": 0.03, "float32": 1e-4}  # mean difference of a logprob, nats
SAME_SHARE = {"bfloat16": 0.75, "float32": 1.0}  # of greedy responses: in bfloat16 two tokens may be equally likely
BANDS = ((-1.0, 0.01), (-5.0, -1.0), (-np.inf, -5.0))  # nats: likely, less likely and unlikely tokens
MOVE = 0.02  # of each weight's own spread: what a publication of other weights changes


def run(settings: Settings, record: Record) -> None:
    size = "tiny" if settings.small else "0.6b"
    record.note(size=size)
    with TemporaryDirectory() as folder:
        check_contract(settings, record, size, Path(folder))


def check_contract(settings: Settings, record: Record, size: str, folder: Path) -> None:
    num, new, longest = (8, 24, 300) if settings.small else (32, 64, 700)
    policy = prepare(settings, size, folder, engine={"max_slots": num, "enforce_eager": settings.small or None})
    trainer = build_random_trainer(policy)
    trainer.sleep()
    from rlpost.engine.vllm import build_engine

    with record.timed("engine_s"):
        engine = build_engine(policy.cfg, model_folder=policy.folder, max_model_len=longest + new + 1)
    rng = np.random.default_rng(0)
    prompts = [random_tokens(int(n), policy.vocab_size, i) for i, n in enumerate(rng.integers(20, longest, num))]
    # Not of the prompts' tokens: scoring the canary leaves its prefix, of the new weights, in the cache.
    canary = [random_tokens(40, policy.vocab_size, 100 + seed) for seed in range(2)]
    device = SharedDevice(engine, trainer, canary=[CanarySequence(ids, 1) for ids in canary], threshold=np.inf)
    record.note(canary_max_nats=device.publish_weights(0).canary_max)

    first = generate(engine, make_requests(prompts, new))
    compare_logprobs(record, settings.dtype, trainer, device, engine, prompts, first)
    check_seeds(record, engine, prompts, new, first)
    check_resume(record, settings.dtype, engine, prompts, new)
    check_stale_prefix(record, settings.dtype, trainer, device, engine, prompts, new)


def compare_logprobs(
    record: Record,
    dtype: str,
    trainer: Any,
    device: SharedDevice,
    engine: Any,
    prompts: Sequence[np.ndarray],
    responses: Responses,
) -> None:
    sequences = [np.concatenate([p, response(responses, i)]).astype(np.int32) for i, p in enumerate(prompts)]
    rollout = np.concatenate([responses.logprobs[f"r{i}"] for i in range(len(prompts))])
    scored = of_responses(prompts, engine.score(sequences))
    trained = of_responses(prompts, trainer_scores(trainer, device, sequences))
    for name, a, b in (("rollout_score", rollout, scored), ("score_trainer", scored, trained)):
        apart = np.abs(a - b)
        record.note(**{f"{name}_mean_nats": float(apart.mean())})
        for low, high in BANDS:
            of_band = apart[(trained > low) & (trained <= high)]
            if len(of_band):
                band = f"above_{-low:g}" if np.isfinite(low) else "below_5"
                record.note(**{f"{name}_max_nats_{band}": float(of_band.max())})
        record.require(apart.mean() < LIMIT[dtype], f"{name}: {apart.mean():.2g} nats apart, not below {LIMIT[dtype]}")


def trainer_scores(trainer: Any, device: SharedDevice, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """It takes the device for it; the publication that gives it back carries the weights that the engine had."""
    with device.training():
        scores: list[np.ndarray] = trainer.score(sequences)
    device.publish_weights(0)
    return scores


def check_seeds(record: Record, engine: Any, prompts: Sequence[np.ndarray], new: int, first: Responses) -> None:
    again, other = (generate(engine, make_requests(prompts, new, seed=seed)) for seed in (1, 1001))
    same = share_equal(first, again)
    starts = float(np.mean([first.token_ids[r][0] == again.token_ids[r][0] for r in first.token_ids]))
    record.note(same_seed_equal_share=same, same_seed_first_token_share=starts)
    record.require(starts >= 0.9, f"the same seeds begin alike in {starts:.0%} of the responses only")
    record.require(share_equal(first, other) < 0.5, "other seeds give the same responses")


def check_resume(record: Record, dtype: str, engine: Any, prompts: Sequence[np.ndarray], new: int) -> None:
    """Aborted in the middle and submitted again with the tokens so far, a greedy response ends as if uninterrupted."""
    requests = make_requests(prompts, new, sampling=GREEDY)
    whole, begun = generate(engine, requests), generate(engine, requests, until=new // 3)
    rest = generate(
        engine,
        [
            replace_parts(r, (*r.parts, response(begun, i)), new - len(begun.token_ids[r.request_id]))
            for i, r in enumerate(requests)
        ],
    )
    joined = Responses({r: begun.token_ids[r] + rest.token_ids[r] for r in whole.token_ids}, {})
    same = share_equal(whole, joined)
    record.note(resumed_equal_share=same)
    record.require(same >= SAME_SHARE[dtype], f"resumed, {same:.0%} of the greedy responses are as they were")


def check_stale_prefix(
    record: Record,
    dtype: str,
    trainer: Any,
    device: SharedDevice,
    engine: Any,
    prompts: Sequence[np.ndarray],
    new: int,
) -> None:
    """After other weights are published, prompts that the engine has seen are computed anew."""
    generate(engine, make_requests(prompts, 1))
    warm = generate(engine, make_requests(prompts, 1)).num_prefilled
    with device.training():
        move_weights(trainer.lm.parameters())
    device.publish_weights(1)
    responses = generate(engine, make_requests(prompts, new, sampling=SAMPLED))
    total = sum(map(len, prompts))
    record.note(prefill_tokens_warm=warm, prefill_tokens_published=responses.num_prefilled, prompt_tokens=total)
    record.require(warm < total, "the prefix cache holds nothing: the comparison could not fail")
    record.require(responses.num_prefilled >= total, "tokens of older weights were taken from the prefix cache")
    sequences = [np.concatenate([p, response(responses, i)]).astype(np.int32) for i, p in enumerate(prompts)]
    rollout = np.concatenate([responses.logprobs[f"r{i}"] for i in range(len(prompts))])
    apart = float(np.abs(rollout - of_responses(prompts, trainer_scores(trainer, device, sequences))).mean())
    record.note(published_rollout_trainer_mean_nats=apart)
    record.require(apart < LIMIT[dtype], f"after a publication {apart:.2g} nats apart, not below {LIMIT[dtype]}")


def move_weights(parameters: Iterable[Any]) -> None:
    """Their values only, and not ZeRO's master copies: nothing is trained afterwards."""
    import torch

    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.add_(MOVE * parameter.std() * torch.sign(parameter.roll(1, 0)))


def response(responses: Responses, index: int) -> np.ndarray:
    return np.array(responses.token_ids[f"r{index}"], np.int32)


def of_responses(prompts: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> np.ndarray:
    """The scores of whole sequences, cut to the responses' tokens and joined."""
    return np.concatenate([s[len(p) - 1 :] for p, s in zip(prompts, scores, strict=True)])


def share_equal(a: Responses, b: Responses) -> float:
    return float(np.mean([a.token_ids[name] == b.token_ids[name] for name in a.token_ids]))


def replace_parts(request: Any, parts: tuple[np.ndarray, ...], new_tokens: int) -> Any:
    return request._replace(parts=parts, max_new_tokens=new_tokens)
