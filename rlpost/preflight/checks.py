"""Everything about a run that can be checked in seconds, without touching a device.

``check(cfg, command)`` raises the first UserError it finds, or returns a report: batch arithmetic, model, data, a
memory plan per device, and what could not be checked offline. ``cli`` calls it before every command. Never imports
torch, transformers, vllm or deepspeed, nor datasets except for a folder that it wrote (a user's own generator may),
never uses the network, and leaves nothing on disk.
"""

from __future__ import annotations

import array
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import Config, SourceConfig, plugins
from rlpost.config.locations import expand_home, resolve_path
from rlpost.config.resolve import resolve
from rlpost.durable.run_dir import MODES, find_checkpoint
from rlpost.errors import ConfigError, DataError, ModelError, RunError, explain
from rlpost.models.files import (
    ModelFiles,
    check_shape,
    check_stop_tokens,
    find_local_folder,
    find_model,
    find_tokenizer_json,
    read_end_tokens,
)
from rlpost.models.shape import DENSE_TYPES, count_params, explain_unsupported
from rlpost.models.tokenizer import TokenizerFiles, check_ids
from rlpost.preflight.check_values import (
    check_shape_fits,
    check_sums,
    check_values,
    config_of_init,
    evaluates_loss,
    example_limit,
    name_sft_run,
)
from rlpost.preflight.device_plan import ASSUMED_GPU_BYTES, device_bytes, format_bytes, free_device_bytes, plan_device
from rlpost.prompts.chat_template import ChatTemplate, read_chat_template, read_template_key
from rlpost.prompts.encoding import (
    add_prefill,
    count_appended,
    describe_empty,
    describe_long,
    find_bad_reference,
    join_messages,
    make_messages,
)
from rlpost.prompts.messages import read_tools, require_in_prompt
from rlpost.prompts.rows import Rows
from rlpost.prompts.sources import list_sources, load_source, name_source
from rlpost.prompts.supervised import list_example_sources, read_conversation
from rlpost.rewards.functions import FunctionFacts, check_columns, load_functions, need_reference
from rlpost.rewards.selection import list_functions, list_models, runs_in_process
from rlpost.rewards.values import THOUGHT_END, THOUGHT_START
from rlpost.rewards.worker_pool import RewardWorkers, choose_num_workers
from rlpost.workers.runtime import choose_device

NUM_MEASURED = 256  # the longest prompts by bytes are tokenized; the others have at most as many tokens as bytes


@dataclass
class CheckReport:
    """What was found. Warnings stop nothing; ``train`` checks what is not checked here before any engine starts."""

    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines: list[str] = []
        for title, body in self.sections:
            lines += [title, *(f"  {line}" for line in body), ""]
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"not checked: {line}" for line in self.not_checked]
        return "\n".join(lines).rstrip()


def check(cfg: Config, command: str = "train") -> CheckReport:
    """Checks what ``rlpost COMMAND`` needs: train, sft or eval. Raises ConfigError, DataError, ModelError, RunError."""
    report = CheckReport()
    check_values(cfg, command)
    check_run_directory(replace(cfg, name=name_sft_run(cfg)) if command == "sft" else cfg)
    if command == "sft":
        _check_sft(cfg, report)
        return report
    _check_generation(cfg, command, report)
    return report


def _check_generation(cfg: Config, command: str, report: CheckReport) -> None:
    """Model, reward and prompts of ``train`` or ``eval``."""
    device, dtype = check_device(cfg, report)
    facts = check_reward(cfg, report)
    files = _check_model(cfg, command, report, device, dtype)
    context = check_context(cfg, files)
    _check_chat(cfg, report)
    for split in ("train", "eval") if command == "train" else ("eval",):
        if split == "train" or command == "eval" or cfg.eval.every >= 0:
            _check_split(cfg, split, files, context, facts, report)
    if command == "train":
        report.sections.insert(0, ("Batch", _describe_batch(resolve(cfg, device=device, threads=1))))
        _plan(cfg, files, context, device, report)


# -- machine -------------------------------------------------------------------------------------------------------


def check_device(cfg: Config, report: CheckReport) -> tuple[str, str]:
    """The device and dtype that a run would use. Raises ConfigError if a GPU is requested and there is none."""
    device = choose_device(cfg)
    resolved = resolve(cfg, device=device, threads=1)
    dtype = resolved.model.dtype
    check_sums(resolved.train, dtype)
    if dtype == "bfloat16" and resolved.train.grad_accum_dtype == "bfloat16":
        report.warnings.append(
            "gradients are summed in bfloat16, which loses what is small beside the sum; use train=zero2"
        )
    if device == "cpu" and dtype == "bfloat16":
        report.warnings.append("model.dtype is bfloat16 on a CPU: several times slower there than float32")
    if device == "cpu" and (cfg.train.offload_optimizer or cfg.train.offload_params):
        report.warnings.append("train.offload_* on a CPU: everything is already in host memory")
    return device, dtype


def check_run_directory(cfg: Config) -> None:
    """Creates and removes a file below the nearest existing folder. Raises RunError or ConfigError."""
    name = str(cfg.name)
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ConfigError(explain("name", name, "a plain folder name", "set name=NAME and runs_dir=FOLDER"))
    if cfg.resume not in MODES:
        find_checkpoint(Path(cfg.resume))
    target = Path(expand_home(cfg.runs_dir)) / name
    nearest = target
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(20, "a file is in the way")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = f"{nearest}: {error.strerror}; set runs_dir"
        raise RunError(explain("run directory", str(target), "a folder this process may write", reason)) from None


# -- model ---------------------------------------------------------------------------------------------------------


def _check_model(cfg: Config, command: str, report: CheckReport, device: str, dtype: str) -> ModelFiles:
    files = find_model(cfg.model)
    lines = [f"{cfg.model.path}, {dtype}"]
    if files.folder is None:
        report.not_checked.append(f"model {cfg.model.path}: not in the local cache; `train` downloads it first")
    if files.shape is None:
        report.not_checked.append("memory plan and context length: neither a config.json here nor a model.shape")
    else:
        origin = "model.shape" if files.folder is None else str(files.folder / "config.json")
        check_shape(files.shape, origin)
        check_shape_fits(cfg, files.shape, origin=origin, device=device, dtype=dtype)
        shape, kind = files.shape, str(files.shape.get("model_type"))
        is_counted = shape.get("model_type", "qwen3") in DENSE_TYPES
        if command == "train":
            problem = explain_unsupported(shape, origin)
            if problem:
                raise ModelError(problem)
            if not is_counted:
                tried = ", ".join(DENSE_TYPES)
                report.not_checked.append(
                    f"model_type {kind}: tried are {tried}; `train` compares engine and trainer before its first step"
                )
        count = f"{count_params(shape):,} parameters" if is_counted else f"model_type {kind}, not counted"
        lines.append(
            f"{count}: {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
            f"vocabulary {shape['vocab_size']:,} (from {origin})"
        )
    if files.folder is not None and files.shape is not None:
        _check_tokenizer(files.folder, cfg.rollout.stop_token_ids, files.shape)
    report.sections.append(("Model", lines))
    return files


def _check_tokenizer(folder: Path, stop_token_ids: Sequence[int], shape: Mapping[str, Any]) -> None:
    """Its ids have rows in the embedding, and something ends a response, as far as its files tell."""
    end_tokens = read_end_tokens(folder)
    tokenizer_json = find_tokenizer_json(folder)
    if tokenizer_json is None:
        return
    tokenizer = TokenizerFiles(tokenizer_json)
    check_ids(tokenizer.vocabulary(), int(shape["vocab_size"]), str(folder / "config.json"))
    if not tokenizer.may_have_end_token():
        check_stop_tokens([*stop_token_ids, *end_tokens])


def check_context(cfg: Config, files: ModelFiles) -> int | None:
    """Prompt + response, tokens; None if unknown."""
    own = files.shape.get("max_position_embeddings") if files.shape else None
    asked = cfg.model.max_context_tokens
    if asked is not None and own is not None and asked > own:
        raise ConfigError(explain("model.max_context_tokens", asked, f"<= {own}, the model's own limit", "lower it"))
    return asked if asked is not None else own


def prompt_limit(cfg: Config, split: str, context: int | None) -> int | None:
    """The longest prompt that leaves room for a full response, tokens."""
    key, response = "rollout.max_response_tokens", cfg.rollout.max_response_tokens
    if split == "eval" and cfg.eval.max_response_tokens is not None:
        key, response = "eval.max_response_tokens", cfg.eval.max_response_tokens
    asked = cfg.data.max_prompt_tokens
    if context is None:
        return asked
    if response >= context:
        expected = f"< {context}, the context"
        raise ConfigError(explain(key, response, expected, "lower it, or raise model.max_context_tokens"))
    if asked is not None and asked + response > context:
        expected = f"<= {context - response}, context {context} minus {key} {response}"
        raise ConfigError(explain("data.max_prompt_tokens", asked, expected, "lower one of them"))
    return context - response if asked is None else asked


# -- reward and data -----------------------------------------------------------------------------------------------


def check_reward(cfg: Config, report: CheckReport) -> tuple[FunctionFacts, ...]:
    """Loads the reward as the run would: in a worker, so that its imports stay out of this process.

    Without a reward model that would have to be downloaded first; then nothing is known about the functions.
    """
    for model in list_models(cfg.reward):
        path = str(model.get("path"))
        if find_local_folder(path, model.get("revision"), "reward model: path") is None:
            report.not_checked.append(f"reward: model {path} is not in the local cache; `train` downloads it first")
            return ()
    if runs_in_process(cfg.reward):
        facts = tuple(function.facts for function in load_functions(cfg.reward, cfg.data.reference_key))
        where = "in the run's own process"
    else:
        workers = RewardWorkers(cfg.reward, cfg.data.reference_key, num_workers=1)
        try:
            workers.wait_ready()
            facts = workers.facts
        finally:
            workers.close()
        count = choose_num_workers(cfg.reward)
        where = f"in {count} worker process{'es' * (count > 1)}"
    lines = []
    for spec, one in zip(list_functions(cfg.reward), facts, strict=True):
        name = spec.function.get("_target_") if isinstance(spec.function, Mapping) else spec.function
        weight = f"{one.name}: {one.weight:g} x " if one.name else ""
        unit = "a group" if one.per_group else "a response"
        deadline = "" if where.startswith("in the run") else f", at most {one.timeout_s:g} s per call"
        lines.append(f"{weight}{name}, {unit} at a time, {where}{deadline}")
    report.sections.append(("Reward", lines))
    return facts


def _check_chat(cfg: Config, report: CheckReport) -> None:
    """A template of the configuration's own, wherever the model is; and a beginning of responses that misleads."""
    if cfg.data.chat_template is not None:
        source = read_template_key(cfg.data.chat_template)
        ChatTemplate(source, {}, cfg.data.chat_template_kwargs, key="data.chat_template")
    prefill = cfg.data.prefill or ""
    if re.search(r"\\n(?![a-z])", prefill):
        do = "in a shell write $'data.prefill=...\\n', in YAML \"...\\n\""
        report.warnings.append(f"data.prefill has a backslash and an n in it, not a line break; for a line break, {do}")
    if THOUGHT_START in prefill.rpartition(THOUGHT_END)[2] and not prefill.rstrip().endswith(THOUGHT_START):
        report.warnings.append(
            f"data.prefill goes on after {THOUGHT_START}: with reward.text=answer, a response that never ends the "
            f"thought counts as an answer; end data.prefill with {THOUGHT_START}"
        )


def _check_split(
    cfg: Config,
    split: str,
    files: ModelFiles,
    context: int | None,
    facts: Sequence[FunctionFacts],
    report: CheckReport,
) -> None:
    limit = prompt_limit(cfg, split, context)
    if split == "eval" and cfg.data.eval == SourceConfig():
        do = "set data.eval.path=FILE.jsonl, or eval.every=-1 to train without evaluation"
        raise ConfigError(explain("data.eval", "no source", "one of path, hub, generator, sources", do))
    lines: list[str] = []
    for source in list_sources(cfg.data, split):
        key, hub = source.key, source.config.hub
        if source.config.path is None and hub is not None:
            report.not_checked.append(f"{key}: {hub} on the hub, split {source.config.split}; `train` loads it first")
            continue
        rows = load_source(cfg, source, split)
        check_columns(facts, [name for name in rows[0] if name != cfg.data.prompt_key], key)
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        lines.append(f"{key}: {len(rows):,} rows from {name_source(source)}{weight}")
        lines += _measure(cfg, source.key, rows, files, limit, report)
        bad = next((line for row in rows if (line := find_bad_reference(row, cfg.data))), "")
        if bad and need_reference(facts):
            raise DataError(bad)
    if lines:
        report.sections.append((f"Data for {'training' if split == 'train' else 'evaluation'}", lines))


def _measure(cfg: Config, key: str, rows: Rows, files: ModelFiles, limit: int | None, report: CheckReport) -> list[str]:
    """Prompt lengths in tokens, as far as they can be known here.

    Raises DataError for a row that makes no prompt, a prompt that is too long, and one that the chat template refuses.
    """
    roles, num_bytes = [], array.array("q")
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number, row in enumerate(rows):
        messages = make_messages(row, cfg.data)
        names = tuple(message["role"] for message in messages)
        if read_tools(row, cfg.data) or any(len(message) > 2 for message in messages):
            names += (str(number),)  # what a template makes of tools and calls is known only once it is rendered
        roles.append(known.setdefault(names, names))  # one object for each sequence of roles
        num_bytes.append(len(join_messages(messages).encode("utf-8", "surrogatepass")))
    tokenizer_json = None if files.folder is None else find_tokenizer_json(files.folder)
    if files.folder is None or tokenizer_json is None:
        report.not_checked.append(f"prompt lengths of {key}: no tokenizer.json here; `train` measures them first")
        return []
    template = read_chat_template(files.folder, cfg.data)
    now = datetime.now()

    def render(index: int) -> str:
        """The text that is encoded."""
        row = rows[index]
        messages, tools, origin = make_messages(row, cfg.data), read_tools(row, cfg.data), row.origin
        require_in_prompt(None if template is None else template.source, messages, tools, origin)
        if template is None:
            text = join_messages(messages)
        else:
            text = template.render(messages, origin=origin, started=now, tools=tools)
        return add_prefill(text, cfg.data, origin, is_chat=template is not None)

    lengths = _count_tokens(TokenizerFiles(tokenizer_json), roles, num_bytes, render, limit, chat=template is not None)
    empty = [index for index, length in lengths.items() if not length]
    if empty:
        raise DataError(describe_empty(rows[empty[0]]))
    too_long = [index for index, length in lengths.items() if limit is not None and length > limit]
    if too_long and cfg.data.long_prompts == "error":
        first = min(too_long)
        raise DataError(describe_long(rows[first], lengths[first], limit or 0))
    if len(too_long) == len(rows):
        raise DataError(f"{key}: all {len(rows)} prompts are longer than {limit} tokens; raise the limit")
    line = f"longest prompt {max(lengths.values()):,} tokens" + ("" if limit is None else f" of {limit:,} allowed")
    return [line + (f"; {len(too_long):,} longer ones are dropped" if too_long else "")]


def _count_tokens(
    tokenizer: TokenizerFiles,
    roles: Sequence[tuple[str, ...]],
    num_bytes: Sequence[int],
    render: Callable[[int], str],
    limit: int | None,
    *,
    chat: bool,
) -> dict[int, int]:
    """Index -> tokens of the prompts that could be the longest, or longer than the limit, and of the shortest.

    One of each sequence of roles is rendered as well: what a chat template adds depends on them, and so does whether it
    refuses the conversation. ``num_bytes``: of the messages' contents, in UTF-8.
    """
    added: dict[tuple[str, ...], int] = {}
    for index, key in enumerate(roles):
        if key not in added:
            added[key] = len(render(index).encode("utf-8", "surrogatepass")) - num_bytes[index]
    sizes = [size + added[key] for size, key in zip(num_bytes, roles, strict=True)]
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    chosen = by_size[:NUM_MEASURED]
    chosen += by_size[NUM_MEASURED:][-1:]  # the shortest, in case it is empty
    if limit is not None:
        chosen += [index for index in by_size[NUM_MEASURED:-1] if sizes[index] > limit]
    appended = 0 if chat else count_appended(tokenizer.encode)
    counts = tokenizer.count_tokens([render(index) for index in chosen], add_special_tokens=not chat)
    return {index: count - appended for index, count in zip(chosen, counts, strict=True)}


# -- sft -----------------------------------------------------------------------------------------------------------


def _check_sft(cfg: Config, report: CheckReport) -> None:
    sft = cfg.sft
    if sft.generate_every >= 0:
        _check_generation(config_of_init(cfg), "eval", report)
    else:
        check_device(cfg, report)
    shape: Mapping[str, Any] | None = None
    if sft.generator is not None:
        plugins.check_target(sft.generator, {}, "sft.generator")
    if sft.init is not None:
        found = find_model(type(cfg.model)(path=sft.init))
        if found.folder is not None and found.shape is not None:
            shape = found.shape
            check_shape(found.shape, str(found.folder / "config.json"))
            _check_lessons_tokenizer(found.folder, found.shape, str(found.folder / "config.json"))
        start = sft.init
    elif sft.tokenizer is None or cfg.model.shape is None:
        missing = "sft.tokenizer" if sft.tokenizer is None else "model.shape"
        do = f"set {missing}, or sft.init to start from a model"
        raise ConfigError(explain(missing, None, "set for a new model", do))
    else:
        check_shape(cfg.model.shape, "model.shape")
        folder = Path(resolve_path(sft.tokenizer))
        if not folder.is_dir():
            do = "nothing there; check the path"
            raise ModelError(explain("sft.tokenizer", sft.tokenizer, "a tokenizer folder", do))
        shape = cfg.model.shape
        _check_lessons_tokenizer(folder, cfg.model.shape, "model.shape")
        start = f"a new model of {count_params(cfg.model.shape):,} parameters"
    if shape is not None:
        example_limit(cfg, shape)
        problem = explain_unsupported(shape, start if sft.init is not None else "model.shape")
        if problem:
            raise ModelError(problem)
    long = f"{sft.steps:,} steps" if sft.steps is not None else f"{sft.epochs:,} passes over data.train"
    lines = [f"{start}; {long}, {sft.tokens_per_step:,} tokens per step"]
    if sft.generator is None:
        lines += _check_examples(cfg, "train", report)
    if evaluates_loss(cfg):
        lines += _check_examples(cfg, "eval", report)
    report.sections.append(("Supervised training", lines))


def _check_examples(cfg: Config, split: str, report: CheckReport) -> list[str]:
    """Every row is an example, as far as that can be known without its tokens; those are made before a model loads."""
    lines = []
    for source in list_example_sources(cfg.data, split):
        if source.config.path is None and source.config.hub is not None:
            what = f"{source.key}: {source.config.hub} on the hub, split {source.config.split}"
            report.not_checked.append(f"{what}; `sft` loads it first")
            continue
        rows = source.load(cfg.data.prompt_key)
        for row in rows:
            read_conversation(row, cfg.data, cfg.sft)
            read_tools(row, cfg.data)
        what = f"lengths and chat template of {source.key}"
        report.not_checked.append(f"{what}: `sft` encodes every row before it loads the model")
        lines.append(f"{source.key}: {len(rows):,} rows from {name_source(source)}")
    return lines


def _check_lessons_tokenizer(folder: Path, shape: Mapping[str, Any], origin: str) -> None:
    """Each lesson ends in the tokenizer's own end token."""
    tokenizer_json = find_tokenizer_json(folder)
    if tokenizer_json is None:
        return
    tokenizer = TokenizerFiles(tokenizer_json)
    check_ids(tokenizer.vocabulary(), int(shape["vocab_size"]), origin)
    if not tokenizer.may_have_end_token():
        do = "set eos_token in tokenizer_config.json"
        raise ModelError(explain("sft", f"a tokenizer without an end token in {folder}", "one that has it", do))


# -- report --------------------------------------------------------------------------------------------------------


def _describe_batch(cfg: Config) -> list[str]:
    rollout, train = cfg.rollout, cfg.train
    prompts, size = rollout.groups_per_step, rollout.samples_per_group
    samples = prompts * size
    updates = train.optimizer_steps_per_rollout * train.epochs
    opened = int((rollout.max_staleness + 1 if rollout.adaptive_oversample else rollout.oversample) * prompts)
    slots = cfg.max_in_flight
    synchronous = rollout.oversample == 1.0 and not rollout.adaptive_oversample
    mode = "synchronous" if synchronous else f"APRIL, tokens up to {rollout.max_staleness} versions old"
    return [
        f"{prompts} prompts x {size} samples = {samples:,} samples per step, at most "
        f"{samples * rollout.max_response_tokens:,} response tokens ({rollout.max_response_tokens:,} each)",
        f"{opened} groups open at most ({mode}), {slots} samples in the engine at once",
        f"{updates} optimizer {'step' if updates == 1 else 'steps'} per rollout ({train.optimizer_steps_per_rollout} "
        f"per epoch x {train.epochs}), about {samples // train.optimizer_steps_per_rollout:,} samples each",
        f"{cfg.steps:,} steps: {cfg.steps * prompts:,} prompts, {cfg.steps * samples:,} samples, "
        f"{cfg.steps * updates:,} optimizer steps",
    ]


def _plan(cfg: Config, files: ModelFiles, context: int | None, device: str, report: CheckReport) -> None:
    """The plan for this machine and, if that is a CPU that is too small, for the GPU the recipe was written for."""
    if files.shape is None:
        return
    total = device_bytes(device)
    plan = plan_device(cfg, files.shape, context, device, total, free_device_bytes(device))
    if plan is None:
        report.not_checked.append(f"memory plan: model_type {files.shape.get('model_type')} is not counted here")
        return
    size = "" if total is None else f" of {format_bytes(total)}"
    report.sections.append((f"Memory per device: {device}{size}, {plan.settings}", plan.describe()))
    if total is None or plan.memory.peak_bytes <= total:
        return
    report.warnings.append(
        f"the run needs about {format_bytes(plan.memory.peak_bytes)} on a device that has {format_bytes(total)}"
    )
    if device == "cpu" and cfg.device == "auto":
        plan = plan_device(cfg, files.shape, context, "cuda", ASSUMED_GPU_BYTES)
        assert plan is not None
        title = f"Memory per device: a GPU of {format_bytes(ASSUMED_GPU_BYTES)} (assumed), {plan.settings}"
        report.sections.append((title, plan.describe()))
