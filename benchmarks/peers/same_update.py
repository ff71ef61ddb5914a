"""Whether both train the same: one rollout of TRL's, then TRL's update and ours on it, from the same weights.

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.same_update [--seed N] [key=value ...]

Prints both gradient norms (before clipping) and how far the weights are apart after the one optimizer step, beside how
far the step moved them. Ends with status 1 where they are not the same up to rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import settings
from benchmarks.peers.train_trl import build_trainer, drop_rank, reward
from rlpost.session import Session, open_session
from rlpost.train.protocol import ColocatedTrainer
from rlpost.types import Group, Prompt, Sample, Segment

MAX_NORM_ERROR = 1e-4  # of the gradient norm, relative; float32 and another order of sums
MAX_WEIGHT_ERROR = (
    0.02  # mean |ours - TRL's| over mean |after - before|: AdamW turns a gradient near 0 into either sign
)


def main(seed: int, overrides: list[str]) -> bool:
    session = open_session(settings.load(seed=seed, own=["rollout=sync"], overrides=["eval.every=-1", *overrides]))
    try:
        ours = build_ours(session)  # DeepSpeed comes before vLLM in a process
        drop_rank()
        with tempfile.TemporaryDirectory() as folder:
            extra = settings.TRL_BEST | {"output_dir": folder, "max_steps": 1}
            trainer = build_trainer(session, extra, patched=True)
            groups: list[Group] = []
            keep_rollout(trainer, session, groups)
            before = weights_of(trainer.model)
            trainer.train()
        theirs = weights_of(trainer.model)
        their_norm = float(trainer.state.log_history[0]["grad_norm"])
        our_norm, our_weights = update_ours(ours, session, groups)
    finally:
        session.close()
    moved = sum(float(np.abs(theirs[name] - before[name]).sum()) for name in before)
    apart = sum(float(np.abs(theirs[name] - our_weights[name]).sum()) for name in before)
    print(f"{sum(group.num_tokens for group in groups)} tokens in {len(groups)} groups")
    print(f"gradient norm: TRL {their_norm:.6f}, rlpost {our_norm:.6f}")
    print(f"weights after the step: apart by {apart / moved:.1e} of what the step moved")
    return abs(our_norm / their_norm - 1) <= MAX_NORM_ERROR and apart / moved <= MAX_WEIGHT_ERROR


def keep_rollout(trainer: Any, session: Session, groups: list[Group]) -> None:
    """Fills ``groups`` with the rollout that ``trainer`` is about to make, rewards included."""
    generate = trainer.vllm_generation.generate
    rollout: list[tuple[list[int], list[int], list[float]]] = []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        prompts, completions, logprobs, ids = generate(*args, **kwargs)
        rollout.extend(
            (prompt, list(tokens), [first[0] for first in of])
            for prompt, tokens, of in zip(prompts, completions, logprobs, strict=True)
        )
        return prompts, completions, logprobs, ids

    def judging(completions: Sequence[str], reference: Sequence[str], **_: Any) -> list[float]:
        rewards = reward(completions, reference)
        groups.extend(to_groups(rollout, rewards, session.cfg.rollout.samples_per_group))
        return rewards

    trainer.vllm_generation.generate = keeping
    trainer.reward_funcs = [judging]


def to_groups(
    rollout: Sequence[tuple[list[int], list[int], list[float]]], rewards: Sequence[float], group_size: int
) -> list[Group]:
    """Neighbours of one prompt as a group of ours."""
    groups = []
    for start in range(0, len(rollout), group_size):
        uid = f"0:{start}"
        samples = [
            Sample(
                uid=uid,
                index=index,
                segments=(
                    Segment(
                        token_ids=np.array(tokens, np.int32),
                        rollout_logprobs=np.array(logprobs, np.float32),
                        policy_version=0,
                    ),
                ),
                finish_reason="stop",
                reward=rewards[start + index],
            )
            for index, (_, tokens, logprobs) in enumerate(rollout[start : start + group_size])
        ]
        prompt = Prompt(uid=uid, token_ids=np.array(rollout[start][0], np.int32), text="")
        groups.append(Group(uid=uid, prompt=prompt, samples=tuple(samples)))
    return groups


def build_ours(session: Session) -> ColocatedTrainer:
    from rlpost.train import deepspeed_trainer

    return deepspeed_trainer.build_trainer(
        session.cfg,
        model_folder=session.model_folder,
        total_optimizer_steps=session.cfg.steps,
        needs_reference=False,
    )


def update_ours(
    trainer: ColocatedTrainer, session: Session, groups: Sequence[Group]
) -> tuple[float, dict[str, np.ndarray]]:
    """Our update on the rollout: the gradient norm before clipping, and the weights after."""
    from rlpost.algos.algorithm import build_algorithm
    from rlpost.algos.batch import build_batches

    cfg = session.cfg
    algorithm = build_algorithm(cfg)
    row_tokens = cfg.train.max_row_tokens
    (batch,) = build_batches(groups, algorithm.advantages(groups), policy_version=0, max_row_tokens=row_tokens)
    result = trainer.update(batch, algorithm.objective)
    weights = {name: tensor.numpy().copy() for bucket in trainer.iter_weights(1 << 28) for name, tensor in bucket}
    return result.grad_norm, weights


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    sys.exit(0 if main(given.seed, given.overrides) else 1)
