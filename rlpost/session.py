"""Assembles a run's parts from its configuration, in the order that works; nothing is decided here.

``run.open_run``, ``evaluate.run_eval`` and, to generate, ``sft.session`` start with ``open_session``: reward workers,
the model's folder, then runtime and environment (before the first heavy import), then tokenizer, prompts and scorers.
No device is touched here, so every error the user can fix is raised before one is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.locations import expand_home
from rlpost.config.resolve import resolve
from rlpost.engine.kv_budget import kv_bytes_needed
from rlpost.engine.protocol import SamplingSettings
from rlpost.errors import ConfigError, DataError, explain
from rlpost.models.files import check_shape, find_model, find_model_folder, find_stop_tokens
from rlpost.models.shape import count_params
from rlpost.models.tokenizer import check_ids, load_tokenizer
from rlpost.preflight.check_values import check_deterministic, check_shape_fits
from rlpost.preflight.device_plan import choose_sleep_here
from rlpost.prompts.chat_template import read_template_key
from rlpost.prompts.encoding import PromptSet, build_prompts
from rlpost.prompts.sources import load_split
from rlpost.rewards.functions import check_columns, load_functions, need_reference
from rlpost.rewards.result_cache import RewardResultCache
from rlpost.rewards.scoring import RewardScorer, make_decode
from rlpost.rewards.selection import runs_in_process
from rlpost.rewards.worker_pool import Calls, InlineCalls, RewardWorkers
from rlpost.types import Prompt
from rlpost.workers.canary import NUM_PROMPTS
from rlpost.workers.protocol import WorkerSettings
from rlpost.workers.runtime import choose_device, choose_threads, require_usable, write_environment


@dataclass(kw_only=True)
class Session:
    """What exists before any engine does."""

    cfg: Config
    model_folder: str
    vocab_size: int
    num_params: int
    hidden_size: int
    tokenizer: Any
    train_sets: tuple[PromptSet, ...]  # one for each source
    eval_prompts: tuple[Prompt, ...]
    stop_token_ids: tuple[int, ...]
    scorer: RewardScorer  # for training
    eval_scorer: RewardScorer  # for evaluation: the same workers, separate results
    calls: Calls  # where the reward functions run
    max_model_len: int  # tokens: the longest prompt plus the longest response
    started: datetime  # when the run began, for a chat template that reads the clock

    @property
    def sampling(self) -> SamplingSettings:
        rollout = self.cfg.rollout
        return SamplingSettings(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=self.stop_token_ids,
        )

    @property
    def eval_response_tokens(self) -> int:
        assert self.cfg.eval.max_response_tokens is not None, "resolved"
        return self.cfg.eval.max_response_tokens

    @property
    def row_tokens(self) -> int:
        assert self.cfg.train.max_row_tokens is not None, "resolved"
        return self.cfg.train.max_row_tokens

    def some_prompts(self, number: int) -> list[Prompt]:
        """The first training prompts, at most ``number``."""
        return list(itertools.islice(itertools.chain.from_iterable(one.prompts for one in self.train_sets), number))

    @property
    def prompt_tokens(self) -> float:
        """Mean prompt length in tokens, over the first 1,000 training prompts."""
        prompts = self.some_prompts(1000)
        return sum(len(p.token_ids) for p in prompts) / len(prompts)

    def worker_settings(self, *, needs_reference: bool) -> WorkerSettings:
        """What every worker is built from; the canary continues training prompts."""
        return WorkerSettings(
            cfg=self.cfg,
            model_folder=self.model_folder,
            vocab_size=self.vocab_size,
            num_params=self.num_params,
            hidden_size=self.hidden_size,
            needs_reference=needs_reference,
            max_model_len=self.max_model_len,
            canary_prompts=[p.token_ids for p in self.some_prompts(NUM_PROMPTS)],
        )

    def open_result_cache(self, run_folder: Path | None, say: Callable[[str], None]) -> None:
        """From now on, cache workers' reward results in ``reward.cache_dir``, or else in the run's folder, if any."""
        reward = self.cfg.reward
        folder = run_folder if reward.cache_dir is None else Path(expand_home(reward.cache_dir))
        if reward.cache and folder is not None and not runs_in_process(reward):
            self.scorer.cache = self.eval_scorer.cache = RewardResultCache(folder, say)

    def close(self) -> None:
        """Close the scorers and the reward workers, even if they are busy."""
        self.scorer.close()
        self.eval_scorer.close()
        if self.scorer.cache is not None:
            self.scorer.cache.close()
        self.calls.close()


def open_session(
    cfg: Config, *, train: bool = True, started: datetime | None = None, run_folder: Path | None = None
) -> Session:
    """Load tokenizer, prompts and reward; choose device and threads; write the environment. The caller closes it.

    Args:
        started: when the run that is resumed began; None: now.
        run_folder: where rewards keep what they have spent; it need not exist yet. None: there is no run.

    Raises:
        ConfigError, DataError, ModelError: anything the user can fix, before a device is touched.
    """
    calls = start_calls(cfg, run_folder)
    try:
        return _open_session(cfg, calls, train=train, started=started or datetime.now())
    except BaseException:
        calls.close()
        raise


def start_calls(cfg: Config, run_folder: Path | None = None) -> Calls:
    """Reward workers, which load the functions while the run continues to start, or the functions in this process."""
    if runs_in_process(cfg.reward):
        return InlineCalls(load_functions(cfg.reward, cfg.data.reference_key, run_folder))
    return RewardWorkers(cfg.reward, cfg.data.reference_key, folder=run_folder)


def _open_session(cfg: Config, calls: Calls, *, train: bool, started: datetime) -> Session:
    model_folder = find_model_folder(cfg)
    shape = find_model(replace(cfg.model, path=model_folder)).shape  # a model just downloaded has not been checked yet
    assert shape is not None
    check_shape(shape, f"{cfg.model.path}: config.json")
    device = choose_device(cfg)
    threads = choose_threads(cfg, device, num_params=count_params(shape))
    cfg = resolve(cfg, device=device, threads=threads)
    check_shape_fits(cfg, shape, origin=cfg.model.path, device=device, dtype=cfg.model.dtype)
    write_environment(device=device, dtype=cfg.model.dtype, threads=threads, vocab_size=int(shape["vocab_size"]))
    if cfg.cluster.kind != "ray":  # the workers' machines have their own
        require_usable(device)
    tokenizer = load_tokenizer(model_folder)
    if cfg.data.chat_template is not None:
        tokenizer.chat_template = read_template_key(cfg.data.chat_template)  # saved with the model
    check_ids(tokenizer.get_vocab(), int(shape["vocab_size"]), f"{cfg.model.path}: config.json")
    context = cfg.model.max_context_tokens or int(shape.get("max_position_embeddings") or 1 << 20)
    train_sets = _load_prompts(cfg, tokenizer, "train", context, started) if train else ()
    eval_sets = () if train and cfg.eval.every < 0 else _load_prompts(cfg, tokenizer, "eval", context, started)
    stop_token_ids = find_stop_tokens(cfg, tokenizer, Path(model_folder))
    calls.wait_ready()
    for split, sets in (("train", train_sets), ("eval", eval_sets)):
        for one in sets:
            columns = [*one.prompts[0].columns, *filter(None, [cfg.data.reference_key])]
            check_columns(calls.facts, columns, f"data.{split}" + (f".sources.{one.name}" if one.name else ""))
            if one.bad_reference and need_reference(calls.facts):
                raise DataError(one.bad_reference)
    longest_prompt = max((one.max_tokens for one in (*train_sets, *eval_sets)), default=0)
    longest_response = max(cfg.rollout.max_response_tokens, _response_limit(cfg, "eval"))
    max_model_len = min(context, longest_prompt + longest_response)
    if cfg.deterministic:
        cfg = pin(cfg, shape, max_model_len=max_model_len)
    if train:  # without a trainer nobody needs the engine's memory
        cfg = choose_sleep_here(cfg, shape, max_model_len)
    decode = make_decode(tokenizer, stop_token_ids)
    retries = cfg.reward.retries if cfg.reward.on_failure == "retry" else 0
    scorer = RewardScorer(calls, decode, group_size=cfg.rollout.samples_per_group, retries=retries)
    eval_scorer = RewardScorer(calls, decode, group_size=cfg.eval.samples_per_prompt, retries=retries)
    return Session(
        cfg=cfg,
        model_folder=model_folder,
        vocab_size=int(shape["vocab_size"]),
        num_params=count_params(shape),
        hidden_size=int(shape["hidden_size"]),
        tokenizer=tokenizer,
        train_sets=train_sets,
        eval_prompts=tuple(
            replace(prompt, uid=f"eval:{one.name}/{n}" if one.name else f"eval:{n}")
            for one in eval_sets
            for n, prompt in enumerate(one.prompts)
        ),
        stop_token_ids=stop_token_ids,
        scorer=scorer,
        eval_scorer=eval_scorer,
        calls=calls,
        max_model_len=max_model_len,
        started=started,
    )


def pin(cfg: Config, shape: Mapping[str, Any], *, max_model_len: int) -> Config:
    """In deterministic mode, also fixes what free memory would otherwise decide: KV cache and slots.

    Raises ConfigError on a GPU.
    """
    check_deterministic(cfg)
    kv_cache_bytes = cfg.engine.kv_cache_bytes or kv_bytes_needed(
        shape, max_slots=cfg.slots_per_engine, max_model_len=max_model_len, dtype=cfg.model.dtype
    )
    return replace(
        cfg,
        engine=replace(cfg.engine, kv_cache_bytes=kv_cache_bytes, enforce_eager=True),
        rollout=replace(cfg.rollout, max_in_flight=cfg.max_in_flight),
    )


def _response_limit(cfg: Config, split: str) -> int:
    limit = cfg.rollout.max_response_tokens if split == "train" else cfg.eval.max_response_tokens
    assert limit is not None, "resolved"
    return limit


def _load_prompts(cfg: Config, tokenizer: Any, split: str, context: int, started: datetime) -> tuple[PromptSet, ...]:
    response = _response_limit(cfg, split)
    limit = min(cfg.data.max_prompt_tokens or context, context - response)
    if limit < 1:
        raise ConfigError(
            explain(
                "context",
                f"{context} tokens for {response} of response",
                "room for a prompt",
                "lower max_response_tokens",
            )
        )
    sets = []
    for source, rows in load_split(cfg, split):
        one = build_prompts(
            rows,
            cfg.data,
            tokenizer,
            max_prompt_tokens=limit,
            started=started,
            name=source.name,
            weight=source.weight,
        )
        sets.append(one)
    return tuple(sets)
