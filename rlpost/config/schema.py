"""The typed schema of a run: the only home of a default, and of what each key means.

``conf/`` selects among groups, ``recipes/`` override for one task, the command line overrides both;
``rlpost.config.compose`` puts them together and ``rlpost.preflight.checks`` refuses combinations that cannot work. Nothing here
imports torch, so ``rlpost check`` stays fast. Every field's ``doc`` gives unit, range and effect.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Optional

from rlpost.errors import ConfigError, explain

# Tokens per packed row. CPU: 1,024 and 2,048 were fastest on the demo's model, 256 took 1.17x, 4,096 1.2x as long.
ROW_TOKENS = {"cpu": 1024, "cuda": 16384}


def opt(default: Any, doc: str) -> Any:
    """A field with its documentation; mutable defaults are copied per instance."""
    metadata = {"doc": doc}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if is_dataclass(default) and isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = opt("", "Local folder, Hugging Face name, or rlpost://NAME for a model that ships with the package.")
    revision: Optional[str] = opt(None, "Branch, tag or commit on the hub; None is the default branch.")
    dtype: str = opt(
        "auto", "Weights and activations: float32, bfloat16, or auto (float32 on a CPU, bfloat16 on a GPU)."
    )
    shape: Optional[dict[str, Any]] = opt(
        None, "config.json's keys, for planning and checks where path is a hub name; a local config.json wins."
    )
    max_context_tokens: Optional[int] = opt(
        None, "Prompt + response, tokens; None: the model's own limit. Also the engine's max_model_len."
    )

    def dtype_on(self, device: str) -> str:
        """``dtype``, or what suits the device: bfloat16 is several times slower than float32 on a CPU."""
        return self.dtype if self.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")


@dataclass
class SourceConfig:
    path: Optional[str] = opt(None, "JSONL file, one object a line; rlpost://NAME for one that ships with the package.")
    hub: Optional[str] = opt(None, "Hugging Face datasets name, used when path is not set.")
    subset: Optional[str] = opt(None, "The dataset's configuration name on the hub.")
    split: str = opt("train", "The dataset's split on the hub.")
    generator: Optional[Any] = opt(
        None,
        "A function (Hydra _target_ with its arguments) returning a list of rows; used when path and hub are not set.",
    )
    unique: bool = opt(
        False, "Leave out rows whose prompt repeats an earlier row's (some hub datasets hold each row many times)."
    )
    limit: Optional[int] = opt(None, "Use only the first rows (after unique); None: all.")


@dataclass
class DataConfig:
    train: SourceConfig = opt(SourceConfig, "Where the training prompts come from.")
    eval: SourceConfig = opt(SourceConfig, "Where the evaluation prompts come from.")
    prompt_key: str = opt("prompt", "Column with the question.")
    reference_key: Optional[str] = opt("answer", "Column the reward compares with; None: the reward needs none.")
    template: str = opt("{prompt}", "Text put round the question; columns of the row stand in braces.")
    system_prompt: Optional[str] = opt(None, "System message where a chat template is used.")
    chat: str = opt("auto", "Use the tokenizer's chat template: auto (when it has one), always, never.")
    max_prompt_tokens: Optional[int] = opt(None, "Longest prompt, tokens; None: context minus max_response_tokens.")
    long_prompts: str = opt("error", "What happens to a longer prompt: error (stop before the run) or drop (counted).")
    shuffle: bool = opt(True, "Draw each epoch in a new order that depends on the seed and the epoch only.")


@dataclass
class RewardConfig:
    function: Any = opt(
        "exact_answer",
        "Name in rlpost.rewards, dotted path package.module.function, or {_target_: ..., key: value}; null with reward.functions.",
    )
    args: dict[str, Any] = opt({}, "Keyword arguments bound to reward.function.")
    style: str = opt(
        "auto",
        "Signature of reward.function: rlpost, trl, or auto (trl where a parameter is called completions, else rlpost).",
    )
    calls: str = opt(
        "auto",
        "What one call judges: sample, group, or auto (group where a parameter is called responses or completions).",
    )
    functions: dict[str, Any] = opt(
        {},
        "Several functions, with reward.function=null: NAME: {function, weight, args, style, calls}; the reward is their weighted sum.",
    )
    messages: bool = opt(False, "TRL's style only: prompts and completions as lists of chat messages, not as text.")
    workers: Optional[int] = opt(
        None,
        "Processes that call the reward; 0: in the run's own, without deadlines. None: 0 where every function is exact_answer, gsm8k, last_number, digit_share or format_match, else one a core, at most 16.",
    )
    timeout_s: float = opt(
        30.0, "Longest time for one call; then its process is killed. A function's own attribute timeout_s goes before."
    )
    start_timeout_s: float = opt(300.0, "Longest time for a worker to import and make the functions.")
    concurrency: int = opt(
        8, "Calls of an async function under way at once in one worker. Its attribute concurrency goes before."
    )
    memory_bytes: Optional[int] = opt(
        None, "Address space of a worker; more is a MemoryError in the reward. None: no limit."
    )
    on_failure: str = opt(
        "drop",
        "A call that failed: drop (its samples leave their group) or retry (up to reward.retries times, then drop).",
    )
    retries: int = opt(2, "How often a failed call is made again with on_failure=retry.")
    cache: bool = opt(
        True, "Keep verdicts of workers on disk, so that a resume or an evaluation does not pay twice; never failures."
    )
    cache_dir: Optional[str] = opt(
        None, "Folder of the verdict cache, which runs may share; None: the run's own (`rlpost eval`: no cache)."
    )
    max_failure_share: float = opt(
        0.5, "Stop the run when a larger share of a step's rewards failed (raised or returned no number); 0 to 1."
    )


@dataclass
class OverlongConfig:
    buffer_tokens: int = opt(
        0, "DAPO eq. 13: the penalty falls linearly over the last buffer_tokens before max_response_tokens; 0: off."
    )
    buffer_share: float = opt(
        0.0, "The same as a share of max_response_tokens, 0 to 1, used where buffer_tokens is 0; 0: off."
    )
    penalty: float = opt(1.0, "Size of the full penalty, in reward units.")


@dataclass
class AlgoConfig:
    name: str = opt("grpo", "The preset's name, for logs.")
    advantage: Any = opt("grpo", "grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, or {_target_: ...}.")
    advantage_eps: float = opt(1e-6, "Added to a standard deviation before dividing by it.")
    loss: Any = opt("clipped", "clipped, gspo, cispo, or {_target_: ...}.")
    clip_low: float = opt(0.2, "The ratio is clipped below at 1 - clip_low.")
    clip_high: float = opt(0.2, "The ratio is clipped above at 1 + clip_high.")
    dual_clip: Optional[float] = opt(None, "For A < 0 the loss is at most -dual_clip * A; > 1; None: off.")
    reduction: Any = opt("token_mean", "token_mean, sequence_mean, constant_length, or {_target_: ...}.")
    constant_length: Optional[int] = opt(None, "Divisor of constant_length, tokens; None: max_response_tokens.")
    kl_coef: float = opt(0.0, "Weight of the KL to the frozen reference; at 0 the reference is not even loaded.")
    kl_estimator: str = opt("k3", "k1 (subtracted from the reward), k2 or k3 (added to the loss).")
    entropy_coef: float = opt(0.0, "Weight of the entropy bonus, per token.")
    filter: Any = opt(
        "none", "none, dynamic_sampling (DAPO: leave out groups of equal unshaped rewards), or {_target_: ...}."
    )
    max_filtered_groups: int = opt(
        512, "Groups a filter may reject in a row without admitting one before the run stops with a message."
    )
    overlong: OverlongConfig = opt(OverlongConfig, "DAPO's soft punishment of responses near the limit.")
    correction: str = opt(
        "token_truncate",
        "Weight on old_logprobs - rollout_logprobs: token_truncate, token_mask, sequence_truncate, sequence_mask, none.",
    )
    correction_cap: float = opt(2.0, "Upper bound of the weight (truncate) or of the ratios kept (mask).")
    correction_floor: float = opt(0.5, "Lower bound of the ratios kept (mask only).")
    old_logprobs: str = opt(
        "trainer", "The proximal policy of the clip: trainer (start of the update) or rollout (the behaviour policy)."
    )


@dataclass
class RolloutConfig:
    groups_per_step: int = opt(32, "N: prompts trained per step, >= 1.")
    samples_per_group: int = opt(8, "G: responses per prompt, >= 1 (>= 2 for group-relative advantages).")
    oversample: float = opt(
        2.0,
        "Groups that may be open or admitted in a step, over N; >= 1.0 and <= max_staleness + 1. 1.0 is synchronous.",
    )
    adaptive_oversample: bool = opt(
        False,
        "Choose the ratio anew in each step, up to max_staleness + 1, from the measured lengths, so that all slots stay taken; "
        "oversample is where it starts.",
    )
    max_staleness: int = opt(4, "S: how many policy versions older than the trained one a token may be, >= 0.")
    on_stale: str = opt(
        "schedule",
        "How S is kept: schedule (what is due is generated and trained first; nothing is ever thrown away) or restart "
        "(first come, first trained; a group that grows too old starts again and its tokens are discarded, which selects "
        "against long responses).",
    )
    admission: str = opt(
        "first_complete",
        "Which complete groups a step trains: first_complete (favours short responses within a step) or first_begun (only the "
        "N begun first, whatever their lengths; the others are generated ahead, so keep more open).",
    )
    max_in_flight: Optional[int] = opt(
        None,
        "Samples that decode at once, over all engines; None: engine.max_slots of each or, with one worker, as many of them "
        "as the KV cache holds (of full length at first, then of the lengths seen).",
    )
    keep_kv: bool = opt(
        False,
        "Carried-over samples go on with the KV cache of older weights and replay nothing; their new tokens are marked mixed_kv "
        "and their mismatch is reported apart. On a GPU engine and trainer then share the memory all the time.",
    )
    max_response_tokens: int = opt(1024, "Longest response, counted over all segments of a sample.")
    temperature: float = opt(1.0, "Sampling temperature, > 0; the trainer divides its logits by the same number.")
    top_p: float = opt(1.0, "Nucleus sampling; 1.0: off. Refused in training while a correction is on.")
    top_k: int = opt(0, "Sample among the k most likely tokens; 0: off. Refused in training while a correction is on.")
    stop_token_ids: list[int] = opt([], "Token ids that end a response besides the tokenizer's end token.")


@dataclass
class EngineConfig:
    kind: str = opt("vllm", "vllm: the only engine that generates text today.")
    max_slots: int = opt(64, "Most samples decoded together (vLLM's max_num_seqs).")
    tensor_parallel: int = opt(
        1,
        "Devices, each a worker's, that one engine spans; a power of two that divides cluster.num_workers. For models whose "
        "weights or KV do not fit on one; otherwise more engines are faster.",
    )
    kv_cache_bytes: Optional[int] = opt(
        None,
        "KV cache per device; None: what max_slots responses of full length need, at most half the free memory. Fewer samples "
        "run at once where it does not hold max_slots of them.",
    )
    enforce_eager: Optional[bool] = opt(None, "Skip compilation and CUDA graphs; None: True on a CPU, False on a GPU.")
    prefix_caching: bool = opt(True, "Reuse the KV of shared prompts within one policy version.")
    load_format: str = opt("auto", "How vLLM first loads weights; they are replaced by the trainer's at once.")


@dataclass
class TrainConfig:
    zero_stage: int = opt(1, "DeepSpeed ZeRO stage, 1 to 3.")
    offload_optimizer: bool = opt(False, "Keep the optimizer's states in host memory for good (ZeRO-Offload).")
    offload_params: bool = opt(False, "Keep the parameters in host memory (stage 3 only).")
    sleep_offload: bool = opt(True, "While the engine generates, move ZeRO's states to host memory (GPU only).")
    optimizer_steps_per_rollout: int = opt(1, "Optimizer steps over disjoint parts of a rollout, >= 1.")
    epochs: int = opt(1, "Passes over a rollout, >= 1.")
    lr: float = opt(1e-6, "Peak learning rate of AdamW.")
    optimizer: Any = opt("adamw", "The optimizer, or {_target_: ...} for one of your own.")
    reduction: Any = opt(
        "all_ranks", "How ranks combine their gradients; or {_target_: ...} for one of your own (docs/training.md)."
    )
    betas: list[float] = opt([0.9, 0.999], "AdamW's betas.")
    eps: float = opt(1e-8, "AdamW's epsilon.")
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay.")
    schedule: str = opt("constant", "constant, linear or cosine, after warm-up, over all optimizer steps of the run.")
    warmup_steps: int = opt(0, "Optimizer steps of linear warm-up.")
    final_lr_share: float = opt(0.0, "The schedule ends at lr times this.")
    grad_clip: float = opt(1.0, "Global norm the gradient is clipped to; 0: off.")
    max_row_tokens: Optional[int] = opt(
        None, "Tokens per packed row; None: 1024 on a CPU, 16384 on a GPU. A longer sequence gets a row of its own."
    )
    logprob_chunk_tokens: int = opt(1024, "Tokens whose logits exist at once in the logprob pass.")
    gradient_checkpointing: bool = opt(False, "Recompute activations in the backward pass.")

    def row_tokens(self, device: str) -> int:
        """``max_row_tokens``, or what suits the device."""
        return self.max_row_tokens or ROW_TOKENS[device]


@dataclass
class EvalConfig:
    every: int = opt(
        10, "Evaluate every so many steps (and before the first and after the last); 0: only first and last; -1: never."
    )
    samples_per_prompt: int = opt(1, "k of mean@k and pass@k.")
    max_prompts: Optional[int] = opt(None, "Use only the first prompts; None: all.")
    temperature: float = opt(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = opt(1.0, "Nucleus sampling; 1.0: off.")
    max_response_tokens: Optional[int] = opt(None, "None: rollout.max_response_tokens.")
    threshold: float = opt(0.5, "A response counts as correct when its accuracy part (else its reward) is above this.")


@dataclass
class CheckpointConfig:
    every: int = opt(10, "Save every so many steps (and after the last); 0: only after the last; -1: never.")
    every_minutes: float = opt(
        0.0, "Also save, at the end of a step, when the last checkpoint is so many minutes old; 0: off."
    )
    keep_last: int = opt(2, "Newest checkpoints kept, >= 1.")
    keep_every: int = opt(0, "Checkpoints of steps divisible by this are kept for good; 0: none.")
    stop_deadline_s: float = opt(
        30.0, "Seconds that SIGTERM or Ctrl-C leave for saving; then the run ends and the last checkpoint stands."
    )


@dataclass
class LoggingConfig:
    wandb: str = opt("auto", "auto (online with a key, else offline), online, offline, disabled.")
    project: str = opt("rlpost", "The W&B project.")
    group: Optional[str] = opt(
        None, "The W&B group, whose runs show as one band; None: the run's name without -seedN or _sN at its end."
    )
    tags: list[str] = opt([], "W&B tags, beside the algorithm's name and the seed.")
    tensorboard: bool = opt(False, "Also write TensorBoard event files.")
    table_rows: int = opt(16, "Rollouts shown in the W&B table of each step, and of each evaluation.")
    keep_rollouts: bool = opt(True, "Write every trained rollout to rollouts/step-N.parquet.")
    trainer_logprobs: bool = opt(
        False, "Score each rollout once more before its update, for the column old_logprobs; one forward pass."
    )
    progress: str = opt("auto", "auto (a live display on a terminal, lines elsewhere), live, lines, quiet.")


@dataclass
class SFTConfig:
    generator: Any = opt(
        None, "A function (Hydra _target_) returning an endless iterator of rows with prompt and response."
    )
    steps: int = opt(0, "Optimizer steps.")
    tokens_per_step: int = opt(4096, "Tokens per optimizer step, prompts included.")
    lr: float = opt(2e-3, "Peak learning rate.")
    final_lr_share: float = opt(0.05, "Cosine ends at lr times this.")
    warmup_steps: int = opt(20, "Optimizer steps of linear warm-up.")
    betas: list[float] = opt([0.9, 0.95], "AdamW's betas.")
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay.")
    grad_clip: float = opt(1.0, "Global norm the gradient is clipped to; 0: off.")
    output: Optional[str] = opt(None, "Folder for the model; None: runs_dir/NAME-sft/model.")
    init: Optional[str] = opt(None, "Model folder to start from; None: a new model of model.shape with sft.tokenizer.")
    tokenizer: Optional[str] = opt(None, "Tokenizer folder for a new model; rlpost://NAME for one that ships.")


@dataclass
class ClusterConfig:
    kind: str = opt("local", "local: one worker in this process; ray: workers are Ray actors.")
    num_workers: int = opt(1, "Workers, each with one device, one engine and one trainer rank.")
    cpus_per_worker: Optional[int] = opt(None, "CPUs that Ray sets aside for a worker; None: its threads.")
    address: Optional[str] = opt(
        None, "A running Ray cluster (HOST:PORT, or auto); None: a private one on this machine, ended with the run."
    )
    exchange_s: float = opt(0.25, "Seconds an engine generates between two reports to the controller.")
    reserve_share: float = opt(
        0.25, "Requests an engine holds beyond its slots, over its slots, so that refills need no round trip."
    )
    start_timeout_s: float = opt(900.0, "Longest time for all workers to start.")
    abort_timeout_s: float = opt(30.0, "Longest time for a worker to end its requests; then it counts as lost.")
    heartbeat_s: float = opt(2.0, "How often workers are asked for a sign of life.")
    hang_s: float = opt(120.0, "A worker that gives no sign of life for so long is killed and counts as lost.")
    keep_shards: bool = opt(
        True,
        "After each update every worker leaves its trainer state outside its process, so that a dead worker costs no "
        "finished step. Costs host memory: twice the state (16 bytes a parameter in float32, over all workers).",
    )
    shards_dir: str = opt("/dev/shm", "Where that is left: a folder in memory on each worker's machine.")
    shared_storage: bool = opt(
        True,
        "Whether all workers' machines see runs_dir. false: every rank writes its share of a checkpoint into scratch_dir, "
        "from where it is brought to the controller's machine, and back at a resume.",
    )
    scratch_dir: str = opt(
        "/tmp", "With shared_storage=false: a folder on each worker's machine with room for its share and the model."
    )
    max_recoveries: int = opt(
        5, "How often workers may be lost and started anew within one step; one more ends the run."
    )
    object_store_bytes: int = opt(512 << 20, "Shared memory of a private Ray's object store.")


@dataclass
class Config:
    name: Optional[str] = opt(None, "The run's name and folder below runs_dir; None: the recipe's name.")
    recipe: Optional[str] = opt(None, "What recipe= named; written with the run.")
    description: str = opt("", "One line about the recipe, shown by `rlpost recipes`.")
    runs_dir: str = opt("runs", "Folder that holds the run directories.")
    resume: str = opt(
        "auto",
        "auto: go on with an unfinished run of this name; never: start a new one beside it; a checkpoint's or run's folder: "
        "go on from there.",
    )
    ledger_dir: Optional[str] = opt(
        None, "Folder for the live ledger; None: the run directory, or a local folder where that is on a network disk."
    )
    deterministic: bool = opt(
        False,
        "CPU only: a run that was killed and resumed ends bit for bit as one that was not. No decision reads a clock, "
        "verdicts are awaited in a fixed order, and times go to timings.jsonl.",
    )
    seed: int = opt(0, "Seed of data order, sampling and initialisation.")
    steps: int = opt(100, "Rollouts (and publications) of the run.")
    device: str = opt("auto", "auto, cpu or cuda.")
    threads: Optional[int] = opt(None, "CPU threads of the trainer and the engine; None: chosen at start and printed.")
    watchdog_s: float = opt(900.0, "A phase without progress for so long prints all stacks and ends the run; 0: off.")
    canary_threshold: Optional[float] = opt(
        None, "Largest logprob difference between trainer and engine, nats; None: 1e-4 in float32, 0.3 in bfloat16."
    )
    mismatch_stop: float = opt(
        0.5,
        "Stop when the mean |old - rollout| logprob of current-version tokens exceeds this, nats; warns at a tenth.",
    )
    model: ModelConfig = opt(ModelConfig, "The policy.")
    data: DataConfig = opt(DataConfig, "Prompts.")
    reward: RewardConfig = opt(RewardConfig, "How responses are judged.")
    algo: AlgoConfig = opt(AlgoConfig, "Advantages, loss, reduction, filter, correction.")
    rollout: RolloutConfig = opt(RolloutConfig, "Generation and APRIL.")
    engine: EngineConfig = opt(EngineConfig, "The inference engine.")
    train: TrainConfig = opt(TrainConfig, "DeepSpeed and the optimizer.")
    cluster: ClusterConfig = opt(ClusterConfig, "Where workers run.")
    eval: EvalConfig = opt(EvalConfig, "Evaluation.")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "Saving.")
    logging: LoggingConfig = opt(LoggingConfig, "Metrics and tracking.")
    sft: SFTConfig = opt(SFTConfig, "`rlpost sft`: the warm start by imitation.")
    user: dict[str, Any] = opt({}, "Free space for a user's own parts; read by interpolation, never by rlpost.")

    @property
    def max_in_flight(self) -> int:
        """Samples that decode together, over all engines."""
        slots = self.engine.max_slots * self.num_engines
        return min(self.rollout.max_in_flight or slots, slots)

    @property
    def num_engines(self) -> int:
        """Each spans ``engine.tensor_parallel`` workers."""
        return self.cluster.num_workers // self.engine.tensor_parallel


def walk_fields(schema: type = Config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Every key of the schema as (dotted name, default, doc), in order."""
    rows: list[tuple[str, Any, str]] = []
    for f in fields(schema):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc,operator]
        rows.append((prefix + f.name, default, f.metadata["doc"]))
        if is_dataclass(default):
            rows += walk_fields(type(default), f"{prefix}{f.name}.")
    return rows


def check_stage(stage: int) -> None:
    """Stage 0 is refused: in bfloat16 DeepSpeed 0.19 then takes a hidden optimizer step when it starts and drifts from
    plain PyTorch, and in float32 it reports no gradient norm, so a NaN could not be told from a number."""
    if stage not in (1, 2, 3):
        do = "use 1"
        if stage == 0:
            do += ", which costs the same: DeepSpeed's stage 0 reports no gradient norm in float32 and does not match "
            do += "PyTorch in bfloat16"
        raise ConfigError(explain("train.zero_stage", stage, "1, 2 or 3", do))
