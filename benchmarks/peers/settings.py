"""What is compared, from one place: a configuration of ours, and TRL's arguments read off it.

Nothing is written twice: :func:`load` puts our configuration together, :func:`trl_arguments` turns it into keyword
arguments of ``trl.GRPOConfig``, and refuses what TRL has no words for. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from rlpost.config import Config
from rlpost.config.compose import load_config, to_yaml
from rlpost.durable.config_changes import changed_keys, is_among, is_harmless
from rlpost.train.lr_schedule import lr_at

RECIPE = "math/arithmetic"
TRL = "TRL"  # its row
TRL_ADVANTAGE_EPS = 1e-4  # written into TRL's trainer, not an argument
TRL_LOSSES = {"sequence_mean": "grpo", "token_mean": "dapo"}
THREADS = 1

# Of both frameworks: what makes them the same task, and what is not measured switched off.
COMMON = [
    f"recipe={RECIPE}",
    f"algo.advantage_eps={TRL_ADVANTAGE_EPS}",
    f"threads={THREADS}",
    "device=cpu",
    "steps=20",
    "eval.every=2",
    "eval.samples_per_prompt=1",
    "checkpoint.every=-1",
    "logging.wandb=disabled",
    "logging.progress=lines",
]
# What TRL is given beside the arguments read off the configuration: what makes it fastest without changing the work.
TRL_BEST: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 16,
    "vllm_importance_sampling_correction": False,
    "generation_kwargs": {"detokenize": False},
}
# What an override may change: what TRL is given as well, and what is a matter of our rows alone.
HANDED_ON = (
    *("seed", "steps", "data.*", "eval.*", "model.path", "model.max_context_tokens", "engine.max_slots"),
    *("algo.clip_low", "algo.clip_high", "algo.kl_coef", "algo.entropy_coef", "algo.reduction"),
    *("rollout.groups_per_step", "rollout.samples_per_group", "rollout.max_response_tokens"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("train.epochs", "train.lr", "train.betas", "train.eps", "train.weight_decay", "train.grad_clip"),
    *("train.schedule", "train.warmup_steps", "train.final_lr_share", "train.gradient_checkpointing"),
)
OURS_ALONE = (
    *("rollout.oversample", "rollout.adaptive_oversample", "rollout.max_staleness", "rollout.admission"),
    *("rollout.on_stale", "rollout.keep_kv", "algo.correction*", "algo.old_logprobs", "train.max_row_tokens"),
)
# The rows of the table: what is added to COMMON.
OURS = {"rlpost": [], "rlpost, synchronous": ["rollout=sync"]}


def load(*, seed: int, own: list[str], overrides: list[str]) -> Config:
    """Our configuration for one run; ``own`` is a row's of :data:`OURS`, ``overrides`` are the command line's."""
    return load_config([*COMMON, *own, f"seed={seed}", *overrides])


def all_of(overrides: list[str]) -> dict[str, Any]:
    """What a run is known by: a file with other settings is not one of this comparison."""
    return {"common": COMMON, "rows": OURS, "TRL": TRL_BEST, "overrides": overrides}


def trl_arguments(cfg: Config) -> dict[str, Any]:
    """Keyword arguments of ``GRPOConfig`` that ask for the work that ``cfg`` asks of us.

    The learning rate's schedule is not among them: TRL is handed an optimizer with :func:`lr_factor`, as its own
    warm-up starts at zero and ours at ``1 / warmup_steps``. Raises ValueError as :func:`require_expressible`.
    """
    require_expressible(cfg)
    samples = cfg.rollout.groups_per_step * cfg.rollout.samples_per_group
    return {
        # the batch
        "max_steps": cfg.steps,
        "num_generations": cfg.rollout.samples_per_group,
        "generation_batch_size": samples,
        "num_iterations": cfg.train.epochs,
        "shuffle_dataset": False,  # the rows come in the order of our cursor
        # sampling
        "max_completion_length": cfg.rollout.max_response_tokens,
        "temperature": cfg.rollout.temperature,
        "top_p": cfg.rollout.top_p,
        "top_k": cfg.rollout.top_k,
        # the loss
        "loss_type": TRL_LOSSES[cfg.algo.reduction],
        "scale_rewards": "group",
        "beta": cfg.algo.kl_coef,
        "epsilon": cfg.algo.clip_low,
        "epsilon_high": cfg.algo.clip_high,
        "entropy_coef": cfg.algo.entropy_coef,
        "importance_sampling_level": "token",
        # the optimizer
        "learning_rate": cfg.train.lr,
        "adam_beta1": cfg.train.betas[0],
        "adam_beta2": cfg.train.betas[1],
        "adam_epsilon": cfg.train.eps,
        "weight_decay": cfg.train.weight_decay,
        "max_grad_norm": cfg.train.grad_clip,
        # the machine
        "seed": cfg.seed,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": cfg.train.gradient_checkpointing,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        # what is not measured
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def lr_factor(cfg: Config, step: int) -> float:
    """The learning rate of optimizer step ``step`` over ``cfg.train.lr``."""
    train = cfg.train
    return (
        lr_at(
            step,
            peak=train.lr,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            total_steps=cfg.steps,
            final_share=train.final_lr_share,
        )
        / train.lr
    )


def require_expressible(cfg: Config) -> None:
    """Raises ValueError where TRL cannot be asked for the same."""
    wanted = {
        "algo.advantage": (cfg.algo.advantage, "grpo"),
        "algo.advantage_eps": (cfg.algo.advantage_eps, TRL_ADVANTAGE_EPS),
        "algo.loss": (cfg.algo.loss, "clipped"),
        "algo.dual_clip": (cfg.algo.dual_clip, None),
        "algo.filter": (cfg.algo.filter, "none"),
        "algo.overlong": (cfg.algo.overlong.buffer_tokens or cfg.algo.overlong.buffer_share, 0),
        "train.optimizer_steps_per_rollout": (cfg.train.optimizer_steps_per_rollout, 1),
        "reward.function": (cfg.reward.function, "exact_answer"),
        "reward.args": (cfg.reward.args, {}),
    }
    for key, (got, expected) in wanted.items():
        if got != expected:
            raise ValueError(f"{key}: got {got!r}; expected {expected!r}, the only one that TRL is compared with here")
    if cfg.algo.reduction not in TRL_LOSSES:
        raise ValueError(f"algo.reduction: got {cfg.algo.reduction!r}; expected one of {list(TRL_LOSSES)}")
    for change in changed_keys(to_yaml(load(seed=cfg.seed, own=[], overrides=[])), to_yaml(cfg)):
        if not is_among(change.key, (*HANDED_ON, *OURS_ALONE)) and not is_harmless(change.key):
            raise ValueError(f"{change.key}: got {change.now!r}; expected {change.before!r}: TRL is not given it")
