"""One run of TRL's ``GRPOTrainer``, vLLM colocated on the CPU, on the benchmark's clock.

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.train_trl --seed 0 --out FILE [key=value ...]

A process of its own for each run, started by ``run.py``. Data, reward, tokenizer, environment and evaluation are ours,
made from the configuration that our run is made from; everything between is TRL's. The clock starts when the trainer
and its engine are up, and stands still in an evaluation, which generates with TRL's engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.peers import settings, vllm_for_trl
from benchmarks.peers.records import Clock, Evaluation, Run, Time, read_trl_log
from rlpost.engine.protocol import Engine, EngineStep, Request
from rlpost.engine.vllm import read_deltas, sampling_params
from rlpost.evaluate import evaluate_session
from rlpost.prompts.cursor import draw_prompts, open_cursor
from rlpost.rewards.library.answers import exact_answer
from rlpost.session import Session, open_session


def run(seed: int, overrides: list[str], extra: dict[str, Any], *, patched: bool, started: float) -> Run:
    cfg = settings.load(seed=seed, own=[], overrides=overrides)
    session = open_session(cfg)  # writes the environment, so before the first heavy import
    drop_rank()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(session, extra | {"output_dir": folder}, patched=patched)
            recorder = record(trainer, session, started)
            trainer.train()
    finally:
        session.close()
    samples = cfg.rollout.groups_per_step * cfg.rollout.samples_per_group
    return Run(
        name=settings.TRL,
        seed=seed,
        start_s=recorder.start_s,
        steps=read_trl_log(trainer.state.log_history, recorder.times, recorder.generate_s, samples),
        evaluations=recorder.evaluations,
        facts={"settings": settings.all_of(overrides), "arguments": settings.trl_arguments(cfg) | extra},
    )


def drop_rank() -> None:
    """Unsets what rlpost sets for DeepSpeed: TRL then runs as under plain ``python``, without DDP round the model."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]


def build_trainer(session: Session, extra: dict[str, Any], *, patched: bool) -> Any:
    """TRL's trainer on our model, prompts and reward; its vLLM as our engine is set up."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    cfg = session.cfg
    vllm_for_trl.patch(
        unpack=patched,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        max_num_seqs=cfg.engine.max_slots,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(session.model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.train.lr,
        betas=tuple(cfg.train.betas),
        eps=cfg.train.eps,
        weight_decay=cfg.train.weight_decay,
        fused=True,  # as ours
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.lr_factor(cfg, step))
    arguments = settings.trl_arguments(cfg) | {"vllm_max_model_length": session.max_model_len} | extra
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(use_vllm=True, vllm_mode="colocate", **arguments),
        train_dataset=Dataset.from_list(rows(session)),
        processing_class=session.tokenizer,
        optimizers=(optimizer, schedule),
    )


def rows(session: Session) -> list[dict[str, Any]]:
    """The prompts that the run needs, in the order in which our cursor draws them."""
    cfg = session.cfg
    cursor = open_cursor(session.train_sets, seed=cfg.seed, shuffle=cfg.data.shuffle)
    drawn = itertools.islice(draw_prompts(cursor, session.train_sets), cfg.steps * cfg.rollout.groups_per_step)
    return [{"prompt": prompt.text, "reference": prompt.reference} for prompt in drawn]


def reward(completions: Sequence[str], reference: Sequence[str], **_: Any) -> list[float]:
    """Our reward in TRL's signature."""
    return [exact_answer(text, reference=right)["reward"] for text, right in zip(completions, reference, strict=True)]


# ---- the clock and the evaluation


def record(trainer: Any, session: Session, started: float) -> Any:
    """A callback that reads the clock after each step and evaluates when our run would."""
    from transformers import TrainerCallback

    cfg = session.cfg

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.start_s = 0.0
            self.times: list[Time] = []
            self.generate_s: list[float] = []  # one call of the engine a step
            self.evaluations: list[Evaluation] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = time.perf_counter() - started
            self.clock = Clock()
            self.evaluate(0)

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            self.times.append(self.clock.read())
            self.evaluate(state.global_step)

        def evaluate(self, step: int) -> None:
            """When our loop would: before the first step, every so many, after the last."""
            every = cfg.eval.every
            if every < 0 or not (step in (0, cfg.steps) or (every and step % every == 0)):
                return
            at = self.clock.read()
            with self.clock.paused():
                accuracy = measure_accuracy(trainer, session)
            print(f"evaluation after step {step}: accuracy {100 * accuracy:.1f} %", flush=True)
            self.evaluations.append(Evaluation(step=step, time=at, accuracy=accuracy))

    recorder = Recorder()
    trainer.add_callback(recorder)
    generate = trainer.vllm_generation.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        result = generate(*args, **kwargs)
        recorder.generate_s.append(time.perf_counter() - before)
        return result

    trainer.vllm_generation.generate = timed
    return recorder


def measure_accuracy(trainer: Any, session: Session) -> float:
    """Our evaluation on TRL's engine with the weights as they are now: same problems, same seeds, same judge."""
    cfg = session.cfg
    trainer.vllm_generation.sync_weights()
    engine = BorrowedEngine(trainer.vllm_generation.llm, cfg.engine.max_slots)
    result = evaluate_session(session, cast(Engine, engine), policy_version=trainer.state.global_step)
    assert result is not None
    return result.accuracy.mean


class BorrowedEngine:
    """As much of our engine protocol as an evaluation uses, over an ``LLM`` that belongs to another."""

    reserve = 0

    def __init__(self, llm: Any, max_slots: int) -> None:
        self.max_slots = max_slots
        self._engine = llm.llm_engine
        self._live: set[str] = set()

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        for request in requests:
            prompt = {"prompt_token_ids": request.token_ids.tolist()}
            params = sampling_params(request.sampling, request.max_new_tokens, request.seed)
            self._engine.add_request(request.request_id, prompt, params)
            self._live.add(request.request_id)
        return [0] * len(requests)

    def step(self) -> EngineStep:
        started = time.perf_counter()
        deltas = read_deltas(self._engine.step())
        self._live.difference_update(delta.request_id for delta in deltas if delta.finish_reason)
        return EngineStep(
            deltas=deltas, duration_s=time.perf_counter() - started, num_running=len(self._live), num_prefill_tokens=0
        )

    @property
    def num_in_flight(self) -> int:
        return len(self._live)

    def now(self) -> float:
        return time.perf_counter()


if __name__ == "__main__":
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trl", type=json.loads, default={}, metavar="JSON", help="more arguments of GRPOConfig")
    parser.add_argument("--unpatched", action="store_true", help="linear weights stay packed: shows the error")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    extra = settings.TRL_BEST | given.trl
    run(given.seed, given.overrides, extra, patched=not given.unpatched, started=started).write(given.out)
