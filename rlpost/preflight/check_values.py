"""Checks each value against the rule of its key, and refuses combinations of keys. Pure functions of the configuration.

The bounds and options of one key are beside its field in ``rlpost.config.schema``; relations between several keys are
here. Looks at no file and no device; ``rlpost.preflight.checks`` calls it before it does, and ``rlpost.session`` again
with the shape of a model that had to be downloaded. Every message is one line in the house form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlpost.algos import table
from rlpost.config import Config, DataConfig, Key, RolloutConfig, SourceConfig, TrainConfig, look_up, walk_fields
from rlpost.config.rules import check_value
from rlpost.errors import ConfigError, ModelError, explain
from rlpost.models.shape import head_size, kv_bytes, kv_heads
from rlpost.prompts.chat_template import check_arguments
from rlpost.rewards.selection import list_functions
from rlpost.train.table import check_train

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # those of vLLM's attention on a CPU

VOCABULARY_PADDING = 64  # rows, vLLM's

# Keys of other sections that `rlpost sft` reads; the optimizer's numbers are sft's own.
USED_BY_SFT = (
    *("seed", "threads", "watchdog_s", "model.max_context_tokens", "train.zero_stage", "train.eps"),
    *("train.grad_accum_dtype", "train.max_row_tokens", "train.logprob_chunk_tokens"),
)


def check_values(cfg: Config, command: str) -> None:
    """Raises ConfigError for the first value or combination that ``rlpost COMMAND`` cannot work with."""
    for key in walk_fields():
        if _is_checked(key, command, cfg):
            check_value(key.name, look_up(cfg, key.name), key.rule)
    if command == "sft":
        check_sft(cfg)
        check_chat(cfg.data)
        if cfg.sft.generate_every >= 0:
            list_functions(cfg.reward)
            check_tensor_parallel(cfg)
        check_train(cfg.train)
        check_deterministic(cfg)
        check_cluster(cfg)
        return
    check_chat(cfg.data)
    check_oversample(cfg.rollout)
    list_functions(cfg.reward)
    table.check_algo(cfg.algo)
    check_train(cfg.train)
    check_tensor_parallel(cfg)
    check_groups(cfg)
    check_sampling(cfg)
    check_deterministic(cfg)
    check_update(cfg.train, cfg.rollout)
    check_cluster(cfg)
    check_keep_kv(cfg)
    if cfg.logging.trainer_logprobs and not cfg.logging.keep_rollouts:
        expected = "false without logging.keep_rollouts, whose files would hold them"
        raise ConfigError(explain("logging.trainer_logprobs", True, expected, "set logging.keep_rollouts=true"))


def _is_checked(key: Key, command: str, cfg: Config) -> bool:
    """Options always, bounds only if the command uses the number."""
    if key.rule is not None and key.rule.choices:
        return True
    if command == "sft":
        section = key.name.partition(".")[0]
        generation = ("eval", "rollout", "engine", "reward") if cfg.sft.generate_every >= 0 else ()
        sections = ("sft", "data", "checkpoint", "cluster", "logging", *generation)
        return section in sections or key.name in USED_BY_SFT
    return not key.name.startswith("sft.")


def check_sft(cfg: Config) -> None:
    """Raises ConfigError where it is not said what to train on, or for how long."""
    sft = cfg.sft
    if (sft.steps is None) == (sft.epochs is None):
        got = "both sft.steps and sft.epochs" if sft.steps is not None else "neither sft.steps nor sft.epochs"
        raise ConfigError(f"sft.steps: got {got}; expected exactly one of them; set the other to null")
    if sft.generator is not None:
        for key, value in (("epochs", sft.epochs), ("messages_key", sft.messages_key)):
            if value is not None:
                do = "set sft.generator=null to train on data.train"
                raise ConfigError(explain(f"sft.{key}", value, "null with sft.generator", do))
    elif cfg.data.train == SourceConfig():
        expected = "a source in data.train, or a function (_target_) that yields lessons"
        raise ConfigError(explain("sft.generator", None, expected, "set data.train.path=FILE.jsonl"))
    if sft.generator is None and cfg.data.prefill:
        do = "write it into the responses, and set data.prefill=null for `rlpost sft`"
        raise ConfigError(explain("data.prefill", cfg.data.prefill, "null: a row's response is whole", do))
    if sft.messages_key is not None and sft.response_key is not None:
        do = "set one of the two to null"
        raise ConfigError(explain("sft.response_key", sft.response_key, "null beside sft.messages_key", do))
    if sft.messages_key is not None and cfg.data.template != "{prompt}":
        do = "set 'data.template={prompt}': a conversation is trained on as it is"
        raise ConfigError(explain("data.template", cfg.data.template, "{prompt} with sft.messages_key", do))
    if sft.eval_every is not None and sft.eval_every >= 0 and cfg.data.eval == SourceConfig():
        do = "set data.eval.path, or sft.eval_every=-1"
        raise ConfigError(explain("sft.eval_every", sft.eval_every, "-1 without a source in data.eval", do))
    if sft.generate_every >= 0 and cfg.data.eval == SourceConfig():
        do = "set data.eval.path, or sft.generate_every=-1"
        raise ConfigError(explain("sft.generate_every", sft.generate_every, "-1 without a source in data.eval", do))
    if sft.generate_every >= 0 and sft.init is None:
        do = "the engine starts from a model's files; use `rlpost eval` on the finished model"
        raise ConfigError(explain("sft.generate_every", sft.generate_every, "-1 without sft.init", do))


def evaluates_loss(cfg: Config) -> bool:
    """Whether `rlpost sft` measures the loss on ``data.eval``."""
    if cfg.sft.eval_every is None:
        return cfg.sft.generator is None and cfg.data.eval != SourceConfig()
    return cfg.sft.eval_every >= 0


def config_of_init(cfg: Config) -> Config:
    """``cfg`` with the model that supervised training starts from as the model."""
    assert cfg.sft.init is not None
    return replace(cfg, model=replace(cfg.model, path=cfg.sft.init, revision=None, shape=None))


def example_limit(cfg: Config, shape: Mapping[str, Any]) -> int | None:
    """The longest example of supervised training, tokens. Raises ConfigError if more is asked for than the context."""
    own, asked = shape.get("max_position_embeddings"), cfg.model.max_context_tokens
    if own is not None and asked is not None and asked > own:
        raise ConfigError(explain("model.max_context_tokens", asked, f"<= {own}, the model's own limit", "lower it"))
    context = own if asked is None else asked
    limit = cfg.sft.max_example_tokens
    if limit is not None and context is not None and limit > context:
        raise ConfigError(explain("sft.max_example_tokens", limit, f"<= {context}, the model's context", "lower it"))
    return context if limit is None else limit


def name_sft_run(cfg: Config) -> str:
    """The run's folder below ``runs_dir``, beside that of the RL run of the same name."""
    return f"{cfg.name}-sft"


def check_chat(data: DataConfig) -> None:
    """Raises ConfigError for keys of a chat template that is not used, and for arguments that it cannot be given."""
    if data.chat == "never":
        for key, value in (("chat_template", data.chat_template), ("chat_template_kwargs", data.chat_template_kwargs)):
            if value:
                expected = "nothing with data.chat=never, which uses no chat template"
                raise ConfigError(explain(f"data.{key}", value, expected, "take one of the two out"))
    check_arguments(data)


def check_oversample(rollout: RolloutConfig) -> None:
    """Each untrained group must be trained within max_staleness + 1 steps of N groups, so no more may be open."""
    got, most = rollout.oversample, rollout.max_staleness + 1
    if got > most:
        do = f"lower it, or raise rollout.max_staleness (now {rollout.max_staleness})"
        raise ConfigError(explain("rollout.oversample", got, f"<= max_staleness + 1 = {most}", do))
    if rollout.adaptive_oversample and rollout.max_staleness == 0:
        do = "raise it, or set rollout.adaptive_oversample=false: nothing may outlive its step"
        raise ConfigError(explain("rollout.max_staleness", 0, ">= 1 with rollout.adaptive_oversample", do))
    if rollout.admission == "first_begun" and rollout.on_stale == "restart":
        do = "set rollout.on_stale=schedule: restarting late groups selects by length"
        raise ConfigError(explain("rollout.on_stale", "restart", "schedule with admission=first_begun", do))


def check_keep_kv(cfg: Config) -> None:
    """Raises ConfigError if nothing could be kept, or if keeping would break another promise."""
    rollout = cfg.rollout
    if not rollout.keep_kv:
        return
    refused = [
        (
            rollout.oversample == 1.0 and not rollout.adaptive_oversample,
            "rollout.oversample=1.0",
            "nothing is carried over",
        ),
        (rollout.max_staleness == 0, "rollout.max_staleness=0", "nothing is carried over"),
        (rollout.on_stale == "restart", "rollout.on_stale=restart", "a restarted sample has no use for its KV cache"),
        (cfg.deterministic, "deterministic=true", "a run that was killed has lost its KV cache and replays"),
        (cfg.cluster.kind != "local", f"cluster={cfg.cluster.kind}", "a sample may resume on another engine"),
    ]
    for applies, setting, why in refused:
        if applies:
            raise ConfigError(explain("rollout.keep_kv", True, f"false with {setting}", f"{why}; set one of the two"))


def check_deterministic(cfg: Config) -> None:
    """Raises ConfigError for settings that read a clock, and for devices whose results vary."""
    if not cfg.deterministic:
        return
    if cfg.device == "cuda":
        do = "GPU kernels add in varying orders; use device=cpu, or deterministic=false"
        raise ConfigError(explain("device", cfg.device, "cpu with deterministic=true", do))
    if cfg.checkpoint.every_minutes > 0:
        got, expected = cfg.checkpoint.every_minutes, "0 with deterministic=true"
        raise ConfigError(explain("checkpoint.every_minutes", got, expected, "use checkpoint.every"))


def check_cluster(cfg: Config) -> None:
    """Raises ConfigError for impossible numbers of workers, and for Ray's settings without Ray."""
    cluster = cfg.cluster
    if cluster.kind == "local" and cluster.num_workers > 1:
        do = "use cluster=ray, or cluster.num_workers=1"
        raise ConfigError(explain("cluster.num_workers", cluster.num_workers, "1 with cluster=local", do))
    if cluster.kind == "ray" and cfg.deterministic:
        do = "which worker replies first varies; use cluster=local, or deterministic=false"
        raise ConfigError(explain("deterministic", True, "false with cluster=ray", do))
    if cluster.hang_s <= 2 * cluster.heartbeat_s:
        expected = f"> 2 x cluster.heartbeat_s = {2 * cluster.heartbeat_s:g}"
        do = "a worker must be pinged more than once before it counts as hanging"
        raise ConfigError(explain("cluster.hang_s", cluster.hang_s, expected, do))


def check_tensor_parallel(cfg: Config) -> None:
    """Raises ConfigError for engines that the workers cannot form."""
    members, workers = cfg.engine.tensor_parallel, cfg.cluster.num_workers
    if members > 1 and cfg.cluster.kind == "local":
        do = f"use cluster=ray cluster.num_workers={members}: every device of an engine is a worker"
        raise ConfigError(explain("engine.tensor_parallel", members, "1 with cluster=local", do))
    if members & (members - 1) or members > VOCABULARY_PADDING:
        expected = f"a power of two, at most {VOCABULARY_PADDING}"
        do = "choose one: vLLM pads the vocabulary to a multiple of 64 rows and divides these evenly"
        raise ConfigError(explain("engine.tensor_parallel", members, expected, do))
    if workers % members:
        do = "an engine spans engine.tensor_parallel workers; change one of the two"
        raise ConfigError(explain("cluster.num_workers", workers, f"a multiple of {members}", do))


def check_divisible(cfg: Config, shape: Mapping[str, Any], *, origin: str) -> None:
    """Raises ConfigError if a model's heads or MLP cannot be divided over the devices of an engine."""
    members, heads = cfg.engine.tensor_parallel, kv_heads(shape)
    do = f"lower it, or use another model than {origin}"
    for key in ("num_attention_heads", "intermediate_size"):
        if int(shape[key]) % members:
            expected = f"a divisor of {key} = {shape[key]}"
            raise ConfigError(explain("engine.tensor_parallel", members, expected, do))
    if heads % members and members % heads:
        expected = f"a divisor or a multiple of num_key_value_heads = {heads}"
        raise ConfigError(explain("engine.tensor_parallel", members, expected, do))


def check_groups(cfg: Config) -> None:
    size = cfg.rollout.samples_per_group
    for kind, instead in (("advantage", "algo=reinforce_pp"), ("filter", "algo.filter=none")):
        value = getattr(cfg.algo, kind)
        part = table.find(kind, value)
        if size == 1 and part is not None and part.compares_group:
            do = f"{kind} {value} compares the samples of a group; use 8, or {instead}"
            raise ConfigError(explain("rollout.samples_per_group", size, ">= 2", do))
    slots = None if cfg.engine.max_slots is None else cfg.engine.max_slots * cfg.num_engines
    if slots is not None and cfg.rollout.max_in_flight is not None and cfg.rollout.max_in_flight > slots:
        do = "lower it, or raise engine.max_slots"
        expected = f"<= engine.max_slots = {slots}" + (" over all engines" if cfg.num_engines > 1 else "")
        raise ConfigError(explain("rollout.max_in_flight", cfg.rollout.max_in_flight, expected, do))
    if cfg.algo.overlong.buffer_tokens >= cfg.rollout.max_response_tokens:
        expected = f"< rollout.max_response_tokens = {cfg.rollout.max_response_tokens}"
        raise ConfigError(explain("algo.overlong.buffer_tokens", cfg.algo.overlong.buffer_tokens, expected, "lower it"))


def check_sampling(cfg: Config) -> None:
    """The engine's logprobs are renormalized over the tokens that top-p and top-k keep, the trainer's over all."""
    if cfg.algo.correction == "none":
        return
    for key, got, off in (("top_p", cfg.rollout.top_p, 1.0), ("top_k", cfg.rollout.top_k, 0)):
        if got != off:
            expected = f"{off} in training while algo.correction is {cfg.algo.correction}"
            do = "the ratio would be wrong by construction; set it in eval only, or use algo.correction=none"
            raise ConfigError(explain(f"rollout.{key}", got, expected, do))


def check_update(train: TrainConfig, rollout: RolloutConfig) -> None:
    parts, groups = train.optimizer_steps_per_rollout, rollout.groups_per_step
    if parts > groups:
        expected = f"<= rollout.groups_per_step = {groups}"
        do = "each optimizer step trains at least one group; lower it, or raise groups_per_step"
        raise ConfigError(explain("train.optimizer_steps_per_rollout", parts, expected, do))
    if train.offload_optimizer and train.gradient_reduction != "all_ranks":
        do = "set one of the two back: with ZeRO-Offload DeepSpeed keeps gradients where no exchange reaches them"
        raise ConfigError(explain("train.offload_optimizer", True, "false with train.gradient_reduction", do))
    if train.offload_params and train.zero_stage != 3:
        do = "use train=zero3_offload, or offload_params=false"
        stage = "below stage 3" if train.zero_stage is None else f"at zero_stage {train.zero_stage}"
        raise ConfigError(explain("train.offload_params", True, f"false {stage}", do))
    if train.offload_params and train.sleep_offload:
        do = "set train.sleep_offload=false: DeepSpeed cannot move the states of a model whose parameters it offloads"
        raise ConfigError(explain("train.offload_params", True, "false with sleep_offload", do))


def check_sums(train: TrainConfig, dtype: str) -> None:
    """Raises ConfigError where DeepSpeed cannot sum gradients in the type asked for; ``train`` is resolved."""
    wanted, do = train.grad_accum_dtype, "use auto"
    if dtype == "float32" and wanted != "float32":
        raise ConfigError(explain("train.grad_accum_dtype", wanted, "float32 with model.dtype=float32", do))
    if dtype == "bfloat16" and wanted == "float32" and train.zero_stage == 1:
        do = "use train=zero2, or auto: at stage 1 the states that DeepSpeed sums in float32 could not leave a GPU"
        raise ConfigError(explain("train.grad_accum_dtype", wanted, "bfloat16 or auto at stage 1", do))


def check_shape_fits(cfg: Config, shape: Mapping[str, Any], *, origin: str, device: str, dtype: str) -> None:
    """What the engine would refuse only after startup: head size, stop tokens, a KV cache that is too small."""
    if device == "cpu" and head_size(shape) not in CPU_HEAD_SIZES:
        do = "use another model, or a GPU"
        expected = f"one that vLLM's CPU attention supports: {', '.join(map(str, CPU_HEAD_SIZES))}"
        raise ModelError(explain(f"{origin}: attention head size", head_size(shape), expected, do))
    check_divisible(cfg, shape, origin=origin)
    vocabulary = int(shape["vocab_size"])
    foreign = [token for token in cfg.rollout.stop_token_ids if not 0 <= token < vocabulary]
    if foreign:
        expected = f"token ids from 0 to {vocabulary - 1}, the model's vocabulary"
        raise ConfigError(explain("rollout.stop_token_ids", foreign, expected, "remove them"))
    given = cfg.engine.kv_cache_bytes
    tokens, members = cfg.rollout.max_response_tokens + 1, cfg.engine.tensor_parallel
    needed = kv_bytes(shape, num_tokens=tokens, dtype=dtype, tensor_parallel=members)
    if given is not None and given < needed:
        do = "raise it, or leave it unset"
        raise ConfigError(explain("engine.kv_cache_bytes", given, f">= {needed}, one prompt and response", do))
