"""vLLM behind the engine protocol: one in-process engine that shares its device and process with a trainer.

Owns the ``LLM`` object and the requests in flight. Never builds prompts, never scores, never writes the environment;
``rlpost.workers.runtime`` does that, before vLLM is imported:

- ``VLLM_ENABLE_V1_MULTIPROCESSING=0``: the engine lives in this process, so weights are copied, not sent
- ``VLLM_CPU_KVCACHE_SPACE`` unset: it would override the KV size given here
- ``VLLM_LOGGING_LEVEL``, ``OMP_NUM_THREADS``, and in tests ``TORCHDYNAMO_DISABLE=1``: as the program chooses

One engine per process, built after the trainer's process group (DeepSpeed started after vLLM sees a world size of 1)
and shut down last: vLLM's shutdown destroys its process's process group. ``build_engine`` builds one from the config;
``rollout.collect`` and ``workers.colocation`` use it. The vLLM facts this relies on: ``docs/engine.md``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config import Config
from rlpost.engine.kv_budget import (
    bounded_kv_bytes,
    free_bytes,
    free_share_of_gpu,
    kv_bytes_needed,
    require_one_sequence,
)
from rlpost.engine.protocol import NOTHING, WAKE_TAGS, Delta, EngineStep, KVCapacity, Request, SamplingSettings
from rlpost.engine.vllm_process import no_shared_memory, process_state_kept, torch_rng_kept, weights_left_unpacked
from rlpost.errors import ModelError, RunError, explain

SCORE_SLOTS = 4  # sequences that ``score`` has in the engine beside paused requests
SUPPORTED_VLLM = (">=0.28", "<0.33")


def build_engine(cfg: Config, *, model_folder: str, max_model_len: int, tensor_parallel: int = 1) -> VLLMEngine:
    """The engine that a resolved configuration describes; ``max_model_len`` in tokens.

    ``tensor_parallel``: processes that share the engine, including this one; they all build it at the same time.
    """
    return VLLMEngine(
        model_folder,
        max_slots=cfg.slots_per_engine,
        max_model_len=max_model_len,
        dtype=cfg.model.dtype,
        device=cfg.device,
        seed=cfg.seed,
        kv_cache_bytes=cfg.engine.kv_cache_bytes,
        enforce_eager=cfg.engine.enforce_eager,
        prefix_caching=cfg.engine.prefix_caching,
        load_format=cfg.engine.load_format,
        neighbors=cfg.cluster.num_workers if cfg.device == "cpu" else 1,
        tensor_parallel=tensor_parallel,
        keep_kv=cfg.rollout.keep_kv,
        sleeps=cfg.engine.sleep != "never",
    )


class VLLMEngine:
    """See :class:`rlpost.engine.protocol.Engine`; only what is specific to vLLM is described here."""

    def __init__(
        self,
        model_folder: str,
        *,
        max_slots: int,
        max_model_len: int,
        dtype: str,
        device: str,
        seed: int,
        kv_cache_bytes: int | None = None,
        enforce_eager: bool | None = None,
        prefix_caching: bool = True,
        load_format: str = "auto",
        neighbors: int = 1,
        tensor_parallel: int = 1,
        keep_kv: bool = False,
        sleeps: bool = True,
    ) -> None:
        """``max_model_len``: prompt + response, in tokens. ``neighbors``: engines that share the free memory.
        ``keep_kv``: ``pause_all`` keeps requests; a GPU's memory is then never released in sleep, nor
        without ``sleeps``.

        ``tensor_parallel``: number of processes with consecutive ranks in the process group, which must exist, that
        share the engine, including this one; each has one engine, and all do the same (``engine.lockstep``).

        Raises RunError or ModelError before vLLM is imported if version, environment, folder or memory do not fit.
        Restores the process's random states, ``LOCAL_WORLD_SIZE`` and ``torch.set_num_threads`` before it returns;
        vLLM changes all of them.
        """
        require_supported_vllm(device)
        require_environment()
        shape = read_shape(model_folder)
        if kv_cache_bytes is None:
            sequences = max_slots + keep_kv  # one more, for ``score`` while the others are paused
            needed = kv_bytes_needed(
                shape, max_slots=sequences, max_model_len=max_model_len, dtype=dtype, tensor_parallel=tensor_parallel
            )
            kv_cache_bytes = bounded_kv_bytes(needed, needed // sequences, free_bytes(device) // neighbors)
        else:
            require_one_sequence(
                kv_cache_bytes, shape, max_model_len=max_model_len, dtype=dtype, tensor_parallel=tensor_parallel
            )
        on_cpu = device == "cpu"
        self.max_slots = max_slots
        self.reserve = 0
        self.max_model_len = max_model_len
        self.kv_cache_bytes = kv_cache_bytes
        self._device = device
        self._vocab_size = int(shape["vocab_size"])
        self._live: set[str] = set()
        self._keep_kv = keep_kv
        self._drops_memory = not on_cpu and not keep_kv and sleeps  # while it sleeps
        self._paused: dict[str, Any] = {}  # vLLM's requests by id, removed from its scheduler
        self._publications = 0
        self._asleep: set[str] = set()
        self._weights_dropped = False

        arguments: dict[str, Any] = {
            "model": model_folder,
            "dtype": dtype,
            "seed": seed,
            # A GPU's runner keeps the slots of paused requests; ``score`` needs some beside them.
            "max_num_seqs": max_slots + SCORE_SLOTS * keep_kv,
            "max_model_len": max_model_len,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "enforce_eager": on_cpu if enforce_eager is None else enforce_eager,
            "enable_prefix_caching": prefix_caching,
            "enable_sleep_mode": self._drops_memory,
            "load_format": load_format,
            "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, not of the raw logits
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # ignore the model folder's own sampling defaults
            "use_tqdm_on_load": False,
        }
        if tensor_parallel > 1:  # one engine per process of the group, each with its part of every layer
            arguments["tensor_parallel_size"] = tensor_parallel
            arguments["distributed_executor_backend"] = "external_launcher"
            # A process sees one GPU, its own: vLLM's kernel asks for the peers' by number.
            arguments["disable_custom_all_reduce"] = True
        if on_cpu:
            # A seeded request with a chunked prompt crashes vLLM's CPU sampler: "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
        else:
            # With the KV size given, vLLM only compares this share with the free memory at startup: a trainer resident
            # on the device must not make vLLM refuse to start.
            arguments["gpu_memory_utilization"] = free_share_of_gpu()
        with process_state_kept():
            from vllm import LLM

            with contextlib.ExitStack() as building:
                if on_cpu:
                    building.enter_context(weights_left_unpacked())
                if tensor_parallel > 1:
                    building.enter_context(no_shared_memory())
                self._llm: Any = LLM(**arguments)
            self._engine: Any = self._llm.llm_engine
            model = self._llm.apply_model(lambda m: m)[0]

        from rlpost.engine.vllm_weights import EngineWeights

        self._weights = EngineWeights(model, tied=bool(shape.get("tie_word_embeddings", False)))
        self._core: Any = self._engine.engine_core.engine_core
        self._work = _ScheduledWork(self._core.scheduler)
        self._cache: Any = self._core.scheduler.kv_cache_manager
        num_blocks = self._cache.block_pool.num_gpu_blocks - 1  # vLLM reserves one
        block_tokens = int(self._core.scheduler.block_size)
        self.kv_capacity: KVCapacity | None = KVCapacity(tokens=num_blocks * block_tokens, block_tokens=block_tokens)

    # ---- generation

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        self._require_ready("submit")
        assert len(self._live) + len(requests) <= self.max_slots, "the caller keeps num_in_flight <= max_slots"
        token_ids = [self._require_fitting(request) for request in requests]
        for request, ids in zip(requests, token_ids, strict=True):
            prompt: dict[str, Any] = {"prompt_token_ids": ids.tolist()}
            if self._keep_kv:  # blocks of paused requests outlive a publication: later prompts must not hit them
                prompt["cache_salt"] = f"publication {self._publications}"
            self._engine.add_request(
                request.request_id,
                prompt,
                sampling_params(request.sampling, request.max_new_tokens, request.seed),
            )
            self._live.add(request.request_id)
        return [0] * len(requests)

    def step(self) -> EngineStep:
        """Raises RunError if vLLM ends a request for a reason other than "stop" or "length", or reports tokens without
        one finite logprob each."""
        if not self._live:
            return NOTHING
        self._work.clear()
        start = time.perf_counter()
        with torch_rng_kept(self._device):  # vLLM's sampler draws from torch's global generator, as the trainer does
            outputs = self._engine.step()
        deltas = read_deltas(outputs)
        self._live.difference_update(d.request_id for d in deltas if d.finish_reason)
        return EngineStep(
            deltas=deltas,
            duration_s=time.perf_counter() - start,
            num_running=self._work.num_running,
            num_prefill_tokens=self._work.num_prefill_tokens,
            num_preempted=self._work.num_preempted,
            kv_usage=self._cache.usage,
        )

    def abort_all(self) -> EngineStep:
        """The result is always empty: every step delivers all tokens it sampled, so an abort has none left."""
        for request_id in sorted([*self._live, *self._paused]):  # given several, vLLM frees KV in an order of its own
            self._engine.abort_request([request_id])
        self._live.clear()
        self._paused.clear()
        self._drain()
        return NOTHING

    def pause_all(self) -> EngineStep:
        """Running requests leave the scheduler's list and keep their blocks. Requests waiting for room hold none and
        are ended, as are the latest ones while ``score`` has no room for a sequence. A batch in flight on a GPU is
        awaited: its tokens are in the result."""
        assert self._keep_kv, "built without keep_kv"
        scheduler, states = self._core.scheduler, self._engine.output_processor.request_states
        requests, scheduler.running = scheduler.running, []
        # Requests that wait for room would make vLLM schedule, and so wait, for ever.
        waiting = self._live - {states[r.request_id].external_req_id for r in requests}
        self._engine.abort_request(sorted(waiting))
        self._live -= waiting
        deltas: list[Delta] = []
        while self._core.batch_queue:
            deltas += read_deltas(self._engine.step())
        requests = [r for r in requests if not r.is_finished()]
        self._paused = {states[r.request_id].external_req_id: r for r in requests}
        self._live.difference_update(self._paused, (d.request_id for d in deltas if d.finish_reason))
        self._engine.abort_request(sorted(self._live))
        self._live.clear()
        assert self.kv_capacity is not None
        room = -(-self.max_model_len // self.kv_capacity.block_tokens)
        while self._paused and self._cache.block_pool.get_num_free_blocks() < room:
            request_id, _ = self._paused.popitem()
            self._engine.abort_request([request_id])
        self._drain()
        return replace(NOTHING, deltas=deltas)

    def resume(self) -> Sequence[str]:
        self._require_ready("resume")
        self._require_idle("resume")
        self._core.scheduler.running = list(self._paused.values())
        self._live, self._paused = set(self._paused), {}
        return sorted(self._live)

    @property
    def num_in_flight(self) -> int:
        return len(self._live)

    def now(self) -> float:
        return time.perf_counter()

    def watch_batches(self, agree: Callable[[np.ndarray], None]) -> None:
        """``agree`` is called with each sample's number of tokens, i64[samples], before a batch is computed."""
        self._work.agree = agree

    # ---- scoring

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sequences of 1 to ``max_model_len - 1`` tokens (vLLM samples one more, which is discarded).

        The prefix cache is not read (a hit has no logits). Each sequence's logits, [len, vocabulary], exist at once.
        """
        self._require_ready("score")
        self._require_idle("score")
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        scores = [np.zeros(0, np.float32)] * len(sequences)
        for index, sequence in enumerate(sequences):
            self._require_fitting_tokens(f"score:{index}", sequence, 1)
            if len(sequence) > 1:  # a single token has no preceding ones
                self._engine.add_request(f"score:{index}", {"prompt_token_ids": sequence.tolist()}, params)
        with torch_rng_kept(self._device):
            while self._core.scheduler.has_unfinished_requests():  # it does not know the paused ones
                for output in self._engine.step():
                    if output.finished:
                        index = int(output.request_id.removeprefix("score:"))
                        scores[index] = np.asarray(output.prompt_logprobs.logprobs, np.float32)
        for index, sequence in enumerate(sequences):
            _require_one_logprob_each(f"score:{index}", len(sequence) - 1, scores[index])
        return scores

    # ---- weights

    @property
    def weight_names(self) -> list[str]:
        """The HF names that a publication must contain."""
        return self._weights.names

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None:
        """Raises ModelError if a name is unknown or missing: half a publication would mix two versions."""
        self._require_idle("load_weights")
        assert "weights" not in self._asleep, "wake the weights before loading them"
        self._drain()
        loaded: set[str] = set()
        for bucket in buckets:
            loaded.update(self._weights.load(bucket))
        missing = [name for name in self._weights.names if name not in loaded]
        if missing:
            raise ModelError(
                explain(
                    "published weights",
                    f"{len(missing)} missing, such as {missing[0]}",
                    f"all {len(self._weights.names)} of the engine's",
                    "start the engine from the folder that the trainer's model came from",
                )
            )
        self._weights_dropped = False
        self._publications += 1
        if not self._paused and not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a publication; its KV belongs to the old weights")

    def read_weight(self, name: str) -> Any:
        return self._weights.read(name)

    def part_of_weight(self, name: str, tensor: Any) -> Any:
        return self._weights.part_of(name, tensor)

    # ---- device memory

    def sleep(self) -> None:
        """On a GPU, weights and KV are dropped (level 2), unless KV is to be kept; on a CPU nothing moves. The same
        calls are refused on both."""
        self._require_idle("sleep")
        self._drain()
        if self._drops_memory and not self._asleep:
            self._engine.sleep(level=2)
            self._weights_dropped = True
        self._asleep = set(WAKE_TAGS)

    def wake(self, tags: Sequence[str] = WAKE_TAGS) -> None:
        """``("weights",)`` first, load while the trainer is still resident, then the rest once it sleeps."""
        for tag in tags:
            if tag in self._asleep:
                if self._drops_memory:
                    self._engine.wake_up([tag])
                self._asleep.discard(tag)

    def shutdown(self) -> None:
        """Must be the last use of a process group in this process: vLLM destroys it here."""
        if self._llm is None:
            return
        self._live.clear()
        self._paused.clear()
        self._engine.engine_core.shutdown()
        self._llm = self._engine = self._core = self._weights = self._work = self._cache = None  # type: ignore[assignment]
        gc.collect()

    # ---- guards

    def _drain(self) -> None:
        """Let vLLM process what ended: it keeps finished ids, and on a GPU a batch in flight, until the next step."""
        for _ in range(8):
            if not (self._core.scheduler.has_requests() or self._core.batch_queue):
                return
            self._engine.step()
        raise RuntimeError("vLLM still has work after all its requests ended")

    def _require_idle(self, action: str) -> None:
        assert not self._live, f"{action} with {len(self._live)} requests in flight; call abort_all first"

    def _require_ready(self, action: str) -> None:
        assert not self._asleep, f"{action} while the engine sleeps; call wake first"
        assert not self._weights_dropped, f"{action} before load_weights; the weights were dropped in sleep"

    def _require_fitting(self, request: Request) -> np.ndarray:
        """Its token ids, or RunError."""
        token_ids = request.token_ids
        assert request.request_id not in self._live, f"request {request.request_id} is already in flight"
        assert request.max_new_tokens >= 1, f"request {request.request_id}: max_new_tokens must be >= 1"
        self._require_fitting_tokens(request.request_id, token_ids, request.max_new_tokens)
        return token_ids

    def _require_fitting_tokens(self, request_id: str, token_ids: np.ndarray, max_new_tokens: int) -> None:
        if len(token_ids) + max_new_tokens > self.max_model_len:
            raise RunError(
                explain(
                    f"request {request_id}",
                    f"{len(token_ids)} tokens and up to {max_new_tokens} more",
                    f"at most {self.max_model_len} together",
                    "raise model.max_context_tokens or lower rollout.max_response_tokens",
                )
            )
        if not len(token_ids) or token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise RunError(
                explain(
                    f"request {request_id}",
                    f"token ids {[int(token_ids.min()), int(token_ids.max())] if len(token_ids) else []}",
                    f"at least one, from 0 to {self._vocab_size - 1}",
                    "use the model's own tokenizer",
                )
            )


# ---- what vLLM reports


def read_deltas(outputs: Sequence[Any]) -> list[Delta]:
    """vLLM's ``RequestOutput`` (DELTA, flat logprobs) as deltas; raises RunError rather than lose a token.

    A step's tokens and logprobs are converted and checked at once, not request by request: at one token each that is
    most of the work. The deltas' arrays are views of the step's.
    """
    tokens: list[int] = []
    logprobs: list[float] = []
    ends = []
    for output in outputs:
        completion = output.outputs[0]
        if completion.finish_reason not in (None, "stop", "length"):
            raise RunError(
                explain(
                    f"request {output.request_id} ended by vLLM",
                    completion.finish_reason,
                    "stop or length",
                    "look for vLLM's own message above; the run can be resumed from its last checkpoint",
                )
            )
        new = completion.logprobs.logprobs if completion.logprobs else ()
        if len(new) != len(completion.token_ids):
            _require_one_logprob_each(output.request_id, len(completion.token_ids), np.asarray(new, np.float32))
        tokens += completion.token_ids
        logprobs += new
        ends.append(len(tokens))
    token_ids, values = np.array(tokens, np.int32), np.array(logprobs, np.float32)
    all_finite = bool(np.isfinite(values).all())
    deltas, start = [], 0
    for output, end in zip(outputs, ends, strict=True):
        if not all_finite:
            _require_one_logprob_each(output.request_id, end - start, values[start:end])
        deltas.append(
            Delta(output.request_id, token_ids[start:end], values[start:end], output.outputs[0].finish_reason or "")
        )
        start = end
    return deltas


def _require_one_logprob_each(request_id: str, num_tokens: int, logprobs: np.ndarray) -> None:
    if len(logprobs) != num_tokens or not np.isfinite(logprobs).all():
        raise RunError(
            explain(
                f"logprobs of request {request_id}",
                logprobs.tolist(),
                f"{num_tokens} finite numbers, one for each token",
                "check the weights for NaN; if they are fine, report this vLLM version",
            )
        )


def sampling_params(sampling: SamplingSettings, max_new_tokens: int, seed: int) -> Any:
    """vLLM's ``SamplingParams`` for one request of the engine protocol."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=max_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # only the given stop tokens count, whatever the folder's configs say
        seed=seed & 0x7FFF_FFFF_FFFF_FFFF,  # vLLM reads -1 as "no seed"
        logprobs=0,  # only the sampled token's
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,  # FINAL_ONLY would lose the tokens of an aborted request
    )


class _ScheduledWork:
    """Counts what vLLM's scheduler hands to the model, and reports it before it is computed: wraps ``schedule``.

    vLLM's public statistics give prefix hits per finished prompt, but neither the slots of a step nor the prompts
    recomputed after a preemption.
    """

    def __init__(self, scheduler: Any) -> None:
        self.num_running = 0
        self.num_prefill_tokens = 0
        self.num_preempted = 0
        self.agree: Callable[[np.ndarray], None] | None = None
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.add(output)
            if self.agree is not None:
                self.agree(np.array(list(output.num_scheduled_tokens.values()), np.int64))
            return output

        scheduler.schedule = counted

    def clear(self) -> None:
        self.num_running = self.num_prefill_tokens = self.num_preempted = 0

    def add(self, output: Any) -> None:
        """A known request with one token decodes; everything else is prompt: new, the rest of a chunked one, or
        replayed."""
        tokens = output.num_scheduled_tokens
        decoding = sum(1 for request_id in output.scheduled_cached_reqs.req_ids if tokens.get(request_id) == 1)
        self.num_running = max(self.num_running, len(tokens))
        self.num_prefill_tokens += output.total_num_scheduled_tokens - decoding
        self.num_preempted += len(output.preempted_req_ids or ())


# ---- before the engine starts


def require_supported_vllm(device: str) -> str:
    """The installed version. Raises RunError outside SUPPORTED_VLLM, and for the build for another device."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = _require_in_range(metadata.version(package))
            built_for = "cpu" if package == "vllm-cpu" or version.endswith("+cpu") else "cuda"
            if built_for != device:
                do = f"use device={built_for}, or make install DEVICE={'gpu' if device == 'cuda' else 'cpu'}"
                got = f"{package} {version}, which is built for {built_for}"
                raise RunError(explain("vLLM", got, f"the build for device={device}", do))
            return version
    raise RunError(explain("vLLM", "not installed", ",".join(SUPPORTED_VLLM), "run `make install`"))


def _require_in_range(version: str) -> str:
    low, high = (bound.lstrip("<>=") for bound in SUPPORTED_VLLM)
    if not _minor(low) <= _minor(version) < _minor(high):
        raise RunError(
            explain(
                "vLLM version", version, ",".join(SUPPORTED_VLLM), "install a version in that range (`make install`)"
            )
        )
    return version


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def require_environment() -> None:
    """vLLM reads these when it is imported or started; ``rlpost.workers.local`` sets them."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RunError(
            explain(
                "VLLM_ENABLE_V1_MULTIPROCESSING",
                os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"),
                "0, because the engine shares its process with the trainer",
                "call rlpost.workers.local before building an engine",
            )
        )
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        raise RunError(
            explain(
                "VLLM_CPU_KVCACHE_SPACE",
                os.environ["VLLM_CPU_KVCACHE_SPACE"],
                "not set, because it overrides engine.kv_cache_bytes",
                "unset it and use engine.kv_cache_bytes",
            )
        )


def read_shape(model_folder: str) -> dict[str, Any]:
    """The folder's config.json; raises ModelError if it is missing or does not describe a decoder."""
    path = Path(model_folder) / "config.json"
    try:
        shape = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            explain(f"model folder {model_folder}", str(error), "a config.json", "check model.path")
        ) from error
    missing = [k for k in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size") if k not in shape]
    if missing:
        raise ModelError(
            explain(str(path), f"no {missing}", "a dense decoder's config", "use a Qwen2, Qwen3 or Llama model")
        )
    return shape
