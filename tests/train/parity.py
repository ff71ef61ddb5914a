"""Five updates of a real algorithm on the same groups, whatever the number of ranks, and everything they came to."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlpost.algos.algorithm import build_algorithm
from rlpost.algos.batch import build_batches
from rlpost.config import Config
from rlpost.types import Group, Prompt, Sample, Segment, TrainBatch
from rlpost.workers.cluster.trainer_group import TrainerGroup
from tests.train import cases

HIDDEN_SIZE = 32  # of the models in cases
MAX_ROW_TOKENS = 64
# Tokens of each response, by step: alike; one that is as long as many; so few that one row, and one rank, takes them
# all; a few rows; one long sequence beside as many tokens in short ones, whose attention costs less.
LENGTHS: list[list[list[int]]] = [
    [[14, 9, 11, 12], [10, 13, 12, 8], [9, 15, 10, 11]],
    [[58, 2, 1, 3], [2, 1, 4, 2], [3, 3, 1, 2]],
    [[4, 5, 1, 6]],
    [[30, 31, 28, 29], [33, 2, 3, 40]],
    [[61, 12, 9, 11], [7, 8, 1, 1], [2, 1, 2, 1]],
]


def groups_of(step: int) -> list[Group]:
    """Random tokens, behaviour logprobs near the policy's, rewards that are not all alike."""
    random = np.random.default_rng([7, step])
    groups = []
    for g, lengths in enumerate(LENGTHS[step]):
        prompt = Prompt(uid=f"{step}:{g}", token_ids=random.integers(0, cases.VOCAB, 2).astype(np.int32), text="")
        samples = []
        for index, length in enumerate(lengths):
            segment = Segment(
                token_ids=random.integers(0, cases.VOCAB, length).astype(np.int32),
                rollout_logprobs=np.log(random.uniform(0.02, 0.4, length)).astype(np.float32),
                policy_version=step,
            )
            reward = float(random.uniform())
            samples.append(Sample(uid=prompt.uid, index=index, segments=(segment,), reward=reward))
        groups.append(Group(uid=prompt.uid, prompt=prompt, samples=tuple(samples)))
    return groups


def batch_of(step: int, cfg: Config) -> TrainBatch:
    groups = groups_of(step)
    advantages = build_algorithm(cfg).advantages(groups)
    (batch,) = build_batches(groups, advantages, policy_version=step, max_row_tokens=MAX_ROW_TOKENS)
    return batch


def config(stage: int) -> Config:
    cfg = cases.config(stage)
    cfg.rollout.max_response_tokens = MAX_ROW_TOKENS
    return cfg


def train(trainer: Any, cfg: Config, call: Any, *, world: int) -> dict[str, Any]:
    """Five updates through ``TrainerGroup``. ``trainer`` is the rank of this process, ``call`` reaches all of them."""
    ranked = TrainerGroup(call, world=world, hidden_size=HIDDEN_SIZE)
    objective = build_algorithm(cfg).objective
    logprobs = ranked.logprobs(batch_of(4, cfg).rows)
    results, moments = [], [np.zeros(())]
    for step in range(len(LENGTHS)):
        results.append(ranked.update(batch_of(step, cfg), objective))
        moments.append(moments_of(trainer))
    beta = cfg.train.betas[0]
    return {
        "logprobs": np.concatenate(logprobs),
        "losses": [r.loss for r in results],
        "grad_norms": [r.grad_norm for r in results],
        "metrics": [dict(r.metrics) for r in results],
        "gradients": [(m - beta * before) / (1 - beta) for before, m in zip(moments, moments[1:], strict=False)],
        "weights": np.concatenate([w.float().numpy().ravel() for _, w in sorted(cases.weights_of(trainer).items())]),
    }


def moments_of(trainer: Any) -> np.ndarray:
    """f64[parameters]: AdamW's first moment, whose change is the gradient (clipped) of an update; collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    parts = [safe_get_full_optimizer_state(p, "exp_avg") for _, p in sorted(trainer.lm.named_parameters())]
    return np.concatenate([part.double().numpy().ravel() for part in parts])


class Spmd:
    """``Actors.call`` where every rank makes the same calls: each does its own part, and answers are exchanged."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, method: str, *arguments: Any, per_rank: Any = None) -> list[Any]:
        import torch.distributed as dist

        own = per_rank[dist.get_rank()] if per_rank is not None else arguments
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, self._call(method, *own))
        return answers

    def _call(self, method: str, *own: Any) -> Any:
        if method == "logprobs":
            rows, reference = own
            return self._trainer.logprobs(rows, reference=reference)
        return getattr(self._trainer, method)(*own)
