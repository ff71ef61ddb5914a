"""The typed schema of a run: the only home of defaults and of what each key means.

``conf/`` selects among groups, ``recipes/`` override for one task, the command line overrides both;
``rlpost.config.compose`` composes them and ``rlpost.preflight.checks`` refuses combinations that cannot work. Nothing
here imports torch, so ``rlpost check`` stays fast. Every field's ``doc`` gives unit and effect, its rule
(``rlpost.config.rules``) the bounds or the options; checks, messages and documentation read both from here.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Optional

from rlpost.config.rules import Rule


def opt(default: Any, doc: str, **rule: Any) -> Any:
    """A field with its documentation and the arguments of its :class:`Rule`; none if any value of the type is valid.

    Mutable defaults are copied per instance.
    """
    metadata = {"doc": doc, "rule": Rule(**rule) if rule else None}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if is_dataclass(default) and isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = opt("", "Local folder, Hugging Face name, or rlpost://NAME for a model that ships with the package.")
    revision: Optional[str] = opt(None, "Branch, tag or commit on the hub; None: the default branch.")
    dtype: str = opt(
        "auto",
        "Type of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    shape: Optional[dict[str, Any]] = opt(
        None, "config.json's keys, for planning and checks if path is a hub name; a local config.json takes precedence."
    )
    max_context_tokens: Optional[int] = opt(
        None, "Prompt + response, tokens; None: the model's own limit. Also the engine's max_model_len.", low=2
    )


@dataclass
class SourceConfig:
    path: Optional[str] = opt(
        None,
        "JSONL, JSON, CSV or Parquet file, or a folder or glob of them; rlpost://NAME for one that ships with the package.",
    )
    hub: Optional[str] = opt(None, "Hugging Face datasets name, used when path is not set.")
    subset: Optional[str] = opt(None, "The dataset's configuration name on the hub.")
    split: str = opt("train", "The dataset's split on the hub.")
    generator: Optional[Any] = opt(
        None,
        "A function (Hydra _target_ with its arguments) returning a list of rows; used when path and hub are not set.",
    )
    unique: bool = opt(
        False, "Skip rows whose prompt repeats an earlier row's (some hub datasets contain each row many times)."
    )
    limit: Optional[int] = opt(None, "Use only the first rows (after unique); None: all.", low=1)
    sources: dict[str, Any] = opt(
        {},
        "Several sources instead of one: NAME: {path, hub, subset, split, generator, unique, limit, format}, and weight for training.",
    )


@dataclass
class DataConfig:
    train: SourceConfig = opt(SourceConfig, "Where the training prompts come from.")
    eval: SourceConfig = opt(SourceConfig, "Where the evaluation prompts come from.")
    format: str = opt(
        "columns",
        "What the rows look like; columns: prompt_key and reference_key name theirs. Others are converted to prompt and answer.",
        choices=("columns", "alpaca", "open_instruct", "sharegpt", "trl", "verl"),
    )
    prompt_key: str = opt("prompt", "Column with the question.")
    reference_key: Optional[str] = opt("answer", "Column the reward compares with; None: the reward needs none.")
    template: str = opt("{prompt}", "Text put around the question; write columns of the row in braces.")
    system_prompt: Optional[str] = opt(None, "System message, if a chat template is used.")
    chat: str = opt(
        "auto",
        "Whether to use the tokenizer's chat template; auto: when it has one.",
        choices=("auto", "always", "never"),
    )
    chat_template: Optional[str] = opt(
        None,
        "The chat template, instead of the tokenizer's: a Jinja file, or the template itself (text with `{{`, `{%` or a line break). Saved with the model.",
    )
    chat_template_kwargs: dict[str, Any] = opt(
        {}, "Arguments for the chat template, such as enable_thinking: false; a name that it never reads is refused."
    )
    tools_key: Optional[str] = opt(
        None,
        "Column with the tools of a conversation, for the chat template: a list of mappings, or its JSON text; "
        "None: no tools.",
    )
    prefill: Optional[str] = opt(
        None,
        "Text that every response begins with: the last part of each prompt, not of the response. Braces are literal.",
    )
    max_prompt_tokens: Optional[int] = opt(
        None, "Longest prompt, tokens; None: context minus max_response_tokens.", low=1
    )
    long_prompts: str = opt(
        "error",
        "What happens to a longer prompt: error stops before the run starts; drop skips and counts it.",
        choices=("error", "drop"),
    )
    shuffle: bool = opt(True, "Draw each epoch in a new order that depends only on the seed and the epoch.")


@dataclass
class RewardConfig:
    function: Any = opt("exact_answer", "What scores a response; null with reward.functions.", table="reward")
    args: dict[str, Any] = opt({}, "Keyword arguments bound to reward.function.")
    style: str = opt(
        "auto",
        "Signature of reward.function; auto: trl if a parameter is named completions, else rlpost.",
        choices=("auto", "rlpost", "trl"),
    )
    calls: str = opt(
        "auto",
        "What one call scores; auto: a group if a parameter is named responses or completions, else a sample.",
        choices=("auto", "sample", "group"),
    )
    text: str = opt(
        "auto",
        "What a reward gets of a response: answer (what follows the last `</think>`; nothing where a thought is unfinished) or all. auto: answer for shipped rewards that look for an answer or a program, else all.",
        choices=("auto", "answer", "all"),
    )
    functions: dict[str, Any] = opt(
        {},
        "Several functions, with reward.function=null: NAME: {function, weight, args, style, calls, text}; the reward is their weighted sum.",
    )
    messages: bool = opt(False, "TRL style only: pass prompts and completions as lists of chat messages, not as text.")
    workers: Optional[int] = opt(
        None,
        "Processes that call the reward; 0: call it in the run's own process, without deadlines. None: 0 if every function may run in the run's own process (see reward.function), 1 if one loads a model, else one per core, at most 16.",
        low=0,
        high=1024,
    )
    timeout_s: float = opt(
        30.0,
        "Longest time for one call; then its process is killed. The function's timeout_s attribute overrides this.",
        above=0,
    )
    start_timeout_s: float = opt(300.0, "Longest time for a worker to import and construct the functions.", above=0)
    concurrency: int = opt(
        8,
        "Calls of an async function that one worker runs at once. The function's concurrency attribute overrides this.",
        low=1,
    )
    memory_bytes: Optional[int] = opt(
        None, "Address space of a worker; exceeding it is a MemoryError in the reward. None: no limit.", low=1 << 26
    )
    on_failure: str = opt(
        "drop",
        "A call that failed: drop (its samples leave their group) or retry (up to reward.retries times, then drop).",
        choices=("drop", "retry"),
    )
    retries: int = opt(2, "How often a failed call is retried with on_failure=retry.", low=0)
    cache: bool = opt(
        True, "Cache workers' reward results on disk, so that resumes and evaluations do not pay twice; never failures."
    )
    cache_dir: Optional[str] = opt(
        None, "Folder of the reward cache, which runs may share; None: the run's own (`rlpost eval`: no cache)."
    )
    max_failure_share: float = opt(
        0.5,
        "Stop the run if a larger share of a step's rewards failed (raised an error or returned no number).",
        low=0,
        high=1,
    )


@dataclass
class OverlongConfig:
    buffer_tokens: int = opt(
        0,
        "DAPO eq. 13: the penalty falls linearly over the last buffer_tokens before max_response_tokens; 0: off.",
        low=0,
        do="shorten the buffer; 0 is off",
    )
    buffer_share: float = opt(
        0.0,
        "The same as a share of max_response_tokens, used if buffer_tokens is 0; 0: off.",
        low=0,
        high=1,
        do="0.2 is DAPO's value; 0: off",
    )
    penalty: float = opt(1.0, "Size of the full penalty, in reward units.", low=0, do="it is subtracted")


@dataclass
class AlgoConfig:
    name: str = opt("grpo", "The preset's name, for logs.")
    advantage: Any = opt("grpo", "How rewards become advantages.", table="advantage")
    advantage_eps: float = opt(1e-6, "Added to a standard deviation before dividing by it.", low=0, do="use 1e-6")
    loss: Any = opt("clipped", "The policy's loss, per token.", table="loss")
    clip_low: float = opt(
        0.2,
        "The ratio is clipped below at 1 - clip_low.",
        low=0,
        high=1,
        do="the ratio's lower bound is 1 - clip_low",
    )
    clip_high: float = opt(
        0.2, "The ratio is clipped above at 1 + clip_high.", low=0, do="the ratio's upper bound is 1 + clip_high"
    )
    dual_clip: Optional[float] = opt(
        None,
        "For A < 0 the loss is at most -dual_clip * A; None: off.",
        above=1,
        do="use 3.0, or null to switch it off",
    )
    reduction: Any = opt("token_mean", "How per-token losses are reduced to one number.", table="reduction")
    constant_length: Optional[int] = opt(
        None,
        "Divisor of the constant_length reduction, tokens; None: max_response_tokens.",
        low=1,
        do="leave it unset to use rollout.max_response_tokens",
    )
    kl_coef: float = opt(
        0.0,
        "Weight of the KL to the frozen reference; at 0 the reference is not loaded at all.",
        low=0,
        do="use 0 to switch the reference off",
    )
    kl_estimator: str = opt("k3", "How the KL is estimated from logprobs.", table="kl_estimator")
    entropy_coef: float = opt(0.0, "Weight of the entropy bonus, per token.", finite=True)
    filter: Any = opt(
        "none",
        "Which groups are rejected; dynamic_sampling (DAPO): those with equal unshaped rewards.",
        table="filter",
    )
    max_filtered_groups: int = opt(
        512,
        "Groups that a filter may reject in a row, without admitting one, before the run stops with a message.",
        low=1,
        do="use 512",
    )
    overlong: OverlongConfig = opt(OverlongConfig, "DAPO's soft penalty for responses near the limit.")
    correction: str = opt(
        "token_truncate", "Weight from old_logprobs - rollout_logprobs, per token or per sequence.", table="correction"
    )
    correction_cap: float = opt(
        2.0, "Upper bound of the weight (truncate) or of the ratios kept (mask).", above=0, do="use 2.0"
    )
    correction_floor: float = opt(0.5, "Lower bound of the ratios kept (mask only); below the cap.", low=0)
    old_logprobs: str = opt(
        "trainer",
        "The proximal policy of the clip: the trainer's at the start of the update, or the behavior policy of the rollout.",
        choices=("trainer", "rollout"),
    )


@dataclass
class RolloutConfig:
    groups_per_step: int = opt(32, "N: prompts trained per step.", low=1)
    samples_per_group: int = opt(
        8, "G: responses per prompt; at least 2 for parts that compare a group's samples (see algo.advantage).", low=1
    )
    oversample: float = opt(
        2.0,
        "Groups that may be open or admitted in a step, divided by N; at most max_staleness + 1. 1.0 is synchronous.",
        low=1.0,
        do="use 1.0 for synchronous rollouts",
    )
    adaptive_oversample: bool = opt(
        False,
        "Choose the ratio again in each step, up to max_staleness + 1, from the measured lengths, so that all slots stay busy; "
        "oversample is its initial value.",
    )
    max_staleness: int = opt(4, "S: how many policy versions older than the trained one a token may be.", low=0)
    on_stale: str = opt(
        "schedule",
        "How S is enforced: schedule (groups that are due are generated and trained first; nothing is ever discarded) or restart "
        "(first come, first trained; a group that gets too old starts over and its tokens are discarded, which selects "
        "against long responses).",
        choices=("schedule", "restart"),
    )
    admission: str = opt(
        "first_complete",
        "Which complete groups a step trains: first_complete (favors short responses within a step) or first_begun (only the "
        "N groups started first, whatever their lengths; the others are generated ahead, so keep more open).",
        choices=("first_complete", "first_begun"),
    )
    max_in_flight: Optional[int] = opt(
        None,
        "Samples that decode at once, over all engines; None: engine.max_slots of each or, with one worker, as many of them "
        "as fit in the KV cache (at full length at first, then with the lengths seen).",
        low=1,
        do="leave it unset to use engine.max_slots",
    )
    keep_kv: bool = opt(
        False,
        "Carried-over samples resume with the KV cache of older weights and replay nothing; their new tokens are marked mixed_kv "
        "and their mismatch is reported separately. On a GPU, engine and trainer then share the memory all the time.",
    )
    max_response_tokens: int = opt(1024, "Longest response, counted over all segments of a sample.", low=1)
    temperature: float = opt(1.0, "Sampling temperature; the trainer divides its logits by the same number.", above=0)
    top_p: float = opt(
        1.0, "Nucleus sampling; 1.0: off. Not allowed in training while a correction is on.", above=0, high=1
    )
    top_k: int = opt(
        0, "Sample from the k most likely tokens; 0: off. Not allowed in training while a correction is on.", low=0
    )
    stop_token_ids: list[int] = opt([], "Token ids that end a response, besides the tokenizer's end token.")


@dataclass
class EngineConfig:
    kind: str = opt("vllm", "Currently the only engine that generates text.", choices=("vllm",))
    max_slots: Optional[int] = opt(
        None,
        "Maximum number of samples decoded at once (vLLM's max_num_seqs); None: 64 on a CPU, 256 on a GPU, or "
        "more where rollout.max_in_flight asks for more.",
        low=1,
    )
    tensor_parallel: int = opt(
        1,
        "Devices, one per worker, that one engine spans; a power of two that divides cluster.num_workers. For models whose "
        "weights or KV do not fit on one device; otherwise more engines are faster.",
        low=1,
    )
    kv_cache_bytes: Optional[int] = opt(
        None,
        "KV cache per device; None: what max_slots responses of full length need, at most half the free memory. Fewer samples "
        "run at once if it does not hold max_slots of them.",
        low=1,
    )
    enforce_eager: Optional[bool] = opt(None, "Skip compilation and CUDA graphs; None: True on a CPU, False on a GPU.")
    sleep: str = opt(
        "auto",
        "Whether engine and trainer leave a GPU's memory to each other in turns; auto: unless all of it fits with a margin "
        "(`rlpost check` says), with cluster=ray always. never: both keep theirs, and train.sleep_offload is without effect. "
        "On a CPU nothing moves.",
        choices=("auto", "always", "never"),
    )
    prefix_caching: bool = opt(True, "Reuse the KV of shared prompts within one policy version.")
    load_format: str = opt("auto", "How vLLM first loads weights; the trainer's replace them immediately.")


@dataclass
class TrainConfig:
    zero_stage: Optional[int] = opt(
        None,
        "DeepSpeed ZeRO stage; None: 1 in float32 on a CPU, else 2.",
        # In bfloat16, DeepSpeed 0.19's stage 0 takes a hidden optimizer step at startup and drifts from plain PyTorch;
        # in float32 it reports no gradient norm, so a NaN would go unnoticed.
        choices=(1, 2, 3),
        do="use 1, which costs the same as 0: DeepSpeed's stage 0 reports no gradient norm in float32 and does not match "
        "PyTorch in bfloat16",
    )
    grad_accum_dtype: str = opt(
        "auto",
        "Type in which the gradients of a step's rows are summed; auto: float32, except in bfloat16 at stage 1, which sums "
        "in bfloat16.",
        choices=("auto", "float32", "bfloat16"),
    )
    offload_optimizer: bool = opt(False, "Keep the optimizer's states in host memory all the time (ZeRO-Offload).")
    offload_params: bool = opt(False, "Keep the parameters in host memory (stage 3 only).")
    sleep_offload: bool = opt(True, "While the engine generates, move ZeRO's states to host memory (GPU only).")
    optimizer_steps_per_rollout: int = opt(1, "Optimizer steps over disjoint parts of a rollout.", low=1)
    epochs: int = opt(1, "Passes over a rollout.", low=1)
    lr: float = opt(1e-6, "Peak learning rate of AdamW.", above=0)
    optimizer: Any = opt("adamw", "The optimizer.", table="optimizer")
    gradient_reduction: Any = opt(
        "all_ranks", "How the ranks' gradients are combined (docs/training.md).", table="gradient_reduction"
    )
    betas: list[float] = opt([0.9, 0.999], "AdamW's betas.", length=2, low=0, below=1, do="use [0.9, 0.999]")
    eps: float = opt(1e-8, "AdamW's epsilon.", above=0)
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay.", low=0)
    schedule: str = opt(
        "constant",
        "Shape of the learning rate after warmup, over all optimizer steps of the run.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = opt(0, "Optimizer steps of linear warmup.", low=0)
    final_lr_share: float = opt(0.0, "The schedule ends at lr times this.", low=0, high=1)
    grad_clip: float = opt(1.0, "Global norm the gradient is clipped to; 0: off.", low=0)
    max_row_tokens: Optional[int] = opt(
        None,
        "Tokens per packed row; None: 1024 on a CPU, 16384 on a GPU. A longer sequence gets its own row.",
        low=1,
    )
    logprob_chunk_tokens: int = opt(1024, "Tokens whose logits are in memory at once in the logprob pass.", low=1)
    gradient_checkpointing: bool = opt(False, "Recompute activations in the backward pass.")


@dataclass
class EvalConfig:
    every: int = opt(
        10,
        "Evaluate every this many steps (and before the first and after the last); 0: only first and last; -1: never.",
        low=-1,
    )
    samples_per_prompt: int = opt(1, "k in mean@k and pass@k.", low=1)
    max_prompts: Optional[int] = opt(None, "Use only the first prompts; None: all.", low=1)
    temperature: float = opt(1.0, "Sampling temperature; 0 is greedy.", low=0)
    top_p: float = opt(1.0, "Nucleus sampling; 1.0: off.", above=0, high=1)
    max_response_tokens: Optional[int] = opt(None, "None: rollout.max_response_tokens.", low=1)
    threshold: float = opt(
        0.5, "A response counts as correct if its accuracy part (else its reward) is above this.", finite=True
    )


@dataclass
class CheckpointConfig:
    every: int = opt(10, "Save every this many steps (and after the last); 0: only after the last; -1: never.", low=-1)
    every_minutes: float = opt(
        0.0, "Also save, at the end of a step, if the last checkpoint is this many minutes old; 0: off.", low=0
    )
    keep_last: int = opt(2, "Number of newest checkpoints kept.", low=1)
    keep_every: int = opt(0, "Checkpoints of steps divisible by this are kept permanently; 0: none.", low=0)
    stop_deadline_s: float = opt(
        30.0,
        "Seconds that SIGTERM or Ctrl-C allow for saving; after that the run ends and the last checkpoint remains.",
        above=0,
    )


@dataclass
class LoggingConfig:
    wandb: str = opt(
        "auto",
        "Whether W&B is used; auto: online with a key, else offline.",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = opt("rlpost", "The W&B project.")
    group: Optional[str] = opt(
        None, "The W&B group, whose runs are shown as one band; None: the run's name without a final -seedN or _sN."
    )
    tags: list[str] = opt([], "W&B tags, in addition to the algorithm's name and the seed.")
    tensorboard: bool = opt(False, "Also write TensorBoard event files.")
    table_rows: int = opt(16, "Rollouts shown in the W&B table of each step, and of each evaluation.", low=0)
    keep_rollouts: bool = opt(True, "Write every trained rollout to rollouts/step-N.parquet.")
    trainer_logprobs: bool = opt(
        False, "Score each rollout once more before its update, for the column old_logprobs; costs one forward pass."
    )
    progress: str = opt(
        "auto",
        "What a run prints; auto: a live display on a terminal, lines elsewhere.",
        choices=("auto", "live", "lines", "quiet"),
    )


@dataclass
class SFTConfig:
    generator: Any = opt(
        None,
        "A function (Hydra _target_) returning an endless iterator of rows with prompt and response; None: data.train is trained on.",
    )
    response_key: Optional[str] = opt(
        None,
        "Column of data.train with the response to the prompt, as text; None: response, with another data.format than columns: answer.",
    )
    messages_key: Optional[str] = opt(
        None, "Column with a whole conversation to train on, instead of a prompt and a response."
    )
    loss_on: str = opt(
        "assistant",
        "Which tokens are trained on: assistant (the response, or the assistant's turns of a conversation, with their end token) or all.",
        choices=("assistant", "all"),
    )
    epochs: Optional[int] = opt(None, "Passes over data.train; instead of sft.steps.", low=1)
    steps: Optional[int] = opt(None, "Optimizer steps, over as many passes as they take; instead of sft.epochs.", low=1)
    tokens_per_step: int = opt(
        4096, "Tokens per optimizer step, including prompts: whole examples until this many are reached.", low=1
    )
    max_example_tokens: Optional[int] = opt(None, "Longest example, tokens; None: the model's context.", low=2)
    long_examples: str = opt(
        "error",
        "What happens to a longer example: error stops before the run starts; drop skips and counts it. None is ever cut.",
        choices=("error", "drop"),
    )
    eval_every: Optional[int] = opt(
        None,
        "Measure the loss on data.eval every this many steps (and before the first and after the last); 0: only first and last; -1: never. None: 0 if training on data.train and data.eval is set, else -1.",
        low=-1,
    )
    generate_every: int = opt(
        -1,
        "Also generate responses to data.eval and score them, as `rlpost eval` does, every this many steps (and before the first and after the last); 0: only first and last; -1: never. Needs sft.init.",
        low=-1,
    )
    lr: float = opt(2e-3, "Peak learning rate.", above=0)
    final_lr_share: float = opt(0.05, "The cosine schedule ends at lr times this.", low=0, high=1)
    warmup_steps: int = opt(20, "Optimizer steps of linear warmup.", low=0)
    betas: list[float] = opt([0.9, 0.95], "AdamW's betas.", length=2, low=0, below=1, do="use [0.9, 0.95]")
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay.", low=0)
    grad_clip: float = opt(1.0, "Global norm the gradient is clipped to; 0: off.", low=0)
    output: Optional[str] = opt(
        None, "Folder for the finished model; None: model in the run's folder, runs_dir/NAME-sft."
    )
    init: Optional[str] = opt(None, "Model folder to start from; None: a new model of model.shape with sft.tokenizer.")
    tokenizer: Optional[str] = opt(None, "Tokenizer folder for a new model; rlpost://NAME for one that ships.")


@dataclass
class ClusterConfig:
    kind: str = opt(
        "local", "local: one worker in this process; ray: workers are Ray actors.", choices=("local", "ray")
    )
    num_workers: int = opt(1, "Workers, each with one device, one engine and one trainer rank.", low=1)
    cpus_per_worker: Optional[int] = opt(None, "CPUs that Ray reserves for a worker; None: its threads.", low=1)
    address: Optional[str] = opt(
        None, "A running Ray cluster (HOST:PORT, or auto); None: a private one on this machine that ends with the run."
    )
    exchange_s: float = opt(0.25, "Seconds an engine generates between two reports to the controller.", above=0)
    reserve_share: float = opt(
        0.25,
        "Requests an engine holds beyond its slots, as a share of its slots, so that refills need no round trip.",
        low=0,
    )
    start_timeout_s: float = opt(900.0, "Longest time for all workers to start.", above=0)
    abort_timeout_s: float = opt(
        30.0, "Longest time for a worker to end its requests; after that it counts as lost.", above=0
    )
    heartbeat_s: float = opt(2.0, "Seconds between heartbeats requested from workers.", above=0)
    hang_s: float = opt(120.0, "A worker that sends no heartbeat for this long is killed and counts as lost.", above=0)
    keep_shards: bool = opt(
        True,
        "After each update every worker keeps its trainer state outside its process, so that a dead worker costs no "
        "finished step. Costs host memory: twice the state (16 bytes per parameter in float32, over all workers).",
    )
    shards_dir: str = opt("/dev/shm", "Where that state is kept: a folder in memory on each worker's machine.")
    shared_storage: bool = opt(
        True,
        "Whether all workers' machines see runs_dir. false: every rank writes its share of a checkpoint into scratch_dir; "
        "from there it is copied to the controller's machine, and back on resume.",
    )
    scratch_dir: str = opt(
        "/tmp", "With shared_storage=false: a folder on each worker's machine with room for its share and the model."
    )
    max_recoveries: int = opt(
        5, "How often workers may be lost and restarted within one step; one more loss ends the run.", low=0
    )
    object_store_bytes: int = opt(
        512 << 20,
        "Shared memory of a private Ray's object store.",
        low=80 << 20,  # Ray's own minimum
    )


@dataclass
class Config:
    name: Optional[str] = opt(None, "The run's name, and its folder below runs_dir; None: the recipe's name.")
    recipe: Optional[str] = opt(None, "The value of recipe=; saved with the run.")
    description: str = opt("", "One line about the recipe, shown by `rlpost recipes`.")
    runs_dir: str = opt("runs", "Folder that holds the run directories.")
    resume: str = opt(
        "auto",
        "auto: resume an unfinished run of this name; never: start a new one beside it; a checkpoint's or run's folder: "
        "resume from there.",
    )
    ledger_dir: Optional[str] = opt(
        None, "Folder for the live ledger; None: the run directory, or a local folder if that is on a network disk."
    )
    deterministic: bool = opt(
        False,
        "CPU only: a run that was killed and resumed ends bit for bit like an uninterrupted one. No decision reads a clock, "
        "reward results are awaited in a fixed order, and times go to timings.jsonl.",
    )
    seed: int = opt(
        0,
        "Seed of data order, sampling and initialization.",
        low=0,
        high=2**32 - 1,  # the maximum for NumPy's legacy generator, which vLLM seeds
    )
    steps: int = opt(100, "Rollouts (and publications) of the run.", low=1)
    device: str = opt("auto", "The run's device; auto: a GPU if there is one.", choices=("auto", "cpu", "cuda"))
    threads: Optional[int] = opt(
        None, "CPU threads of the trainer and the engine; None: chosen at startup and printed.", low=1
    )
    watchdog_s: float = opt(
        900.0, "A phase without progress for this long prints all stacks and ends the run; 0: off.", low=0
    )
    canary_threshold: Optional[float] = opt(
        None,
        "Largest mean logprob difference between trainer and engine over the canary, nats; "
        "None: 1e-4 in float32, 0.1 in bfloat16.",
        above=0,
    )
    mismatch_stop: float = opt(
        0.5,
        "Stop if the mean |old - rollout| logprob of current-version tokens exceeds this, nats; warns at a tenth of it.",
        above=0,
    )
    model: ModelConfig = opt(ModelConfig, "The policy.")
    data: DataConfig = opt(DataConfig, "Prompts.")
    reward: RewardConfig = opt(RewardConfig, "How responses are scored.")
    algo: AlgoConfig = opt(AlgoConfig, "Advantages, loss, reduction, filter, correction.")
    rollout: RolloutConfig = opt(RolloutConfig, "Generation and APRIL.")
    engine: EngineConfig = opt(EngineConfig, "The inference engine.")
    train: TrainConfig = opt(TrainConfig, "DeepSpeed and the optimizer.")
    cluster: ClusterConfig = opt(ClusterConfig, "Where workers run.")
    eval: EvalConfig = opt(EvalConfig, "Evaluation.")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "Saving.")
    logging: LoggingConfig = opt(LoggingConfig, "Metrics and tracking.")
    sft: SFTConfig = opt(SFTConfig, "`rlpost sft`: supervised fine-tuning.")
    user: dict[str, Any] = opt({}, "Free space for users' own parts; read by interpolation, never by rlpost.")

    @property
    def max_in_flight(self) -> int:
        """Samples that decode at once, over all engines; of a resolved configuration."""
        slots = self.slots_per_engine * self.num_engines
        return min(self.rollout.max_in_flight or slots, slots)

    @property
    def slots_per_engine(self) -> int:
        """``engine.max_slots`` of a resolved configuration."""
        assert self.engine.max_slots is not None, "resolved"
        return self.engine.max_slots

    @property
    def num_engines(self) -> int:
        """Each spans ``engine.tensor_parallel`` workers."""
        return self.cluster.num_workers // self.engine.tensor_parallel


class Key(NamedTuple):
    """One key of the schema."""

    name: str  # dotted
    default: Any  # for a section, an instance of its dataclass
    doc: str
    rule: Rule | None  # None if any value of the type is valid
    type: str  # as the schema writes it, such as Optional[int]


def walk_fields(schema: type = Config, prefix: str = "") -> list[Key]:
    """Every key of the schema, in order; a section precedes its keys."""
    keys: list[Key] = []
    for f in fields(schema):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc,operator]
        keys.append(Key(prefix + f.name, default, f.metadata["doc"], f.metadata["rule"], str(f.type)))
        if is_dataclass(default):
            keys += walk_fields(type(default), f"{prefix}{f.name}.")
    return keys


def rule_of(schema: type, name: str) -> Rule:
    """The rule of a field that has one."""
    (rule,) = [f.metadata["rule"] for f in fields(schema) if f.name == name]
    assert isinstance(rule, Rule), f"{schema.__name__}.{name} has no rule"
    return rule


def look_up(cfg: Any, name: str) -> Any:
    """The value of a dotted key below ``cfg``, the configuration or a section of it."""
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg
