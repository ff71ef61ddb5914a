"""How far apart trainer and engine are where nothing is wrong, and with planted faults: where the canary's thresholds
come from.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/canary.py [--models demo qwen3 llama qwen2 FOLDER]
        [--dtypes float32 bfloat16] [--publications 100] [--change 0.003]

``demo`` is the model that ships; ``qwen3``, ``llama`` and ``qwen2`` are tiny random models, whose final norm is scaled
by 8 so that their distributions are peaked; a folder is any other model. Each has a worker of its own, in a process of
its own: the real trainer and vLLM. Before each publication every weight changes by a random ``--change`` of its
tensor's root mean square. Then faults are planted in the engine, one at a time, after a publication: *layer*, the
first layer's weights are from before the first change; *other layer*, they are the second layer's; and 1 % on
*attention* (its scale, all layers), *head* (the final norm) and *norm* (the first layer's input norm).

Statistics of |trainer - engine| logprob over the canary's tokens: *mean*, *max*; *weighted*, the mean weighted by the
trainer's probability; *slope*, of the difference over the trainer's logprob, by least squares; *random*, the largest
over as many random tokens. Health is the largest of all publications, a fault the smallest of ``--repeats``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

RANDOM = ("qwen3", "llama", "qwen2")
STATISTICS = ("mean", "max", "weighted", "slope", "random")
FAULTS = ("layer", "other layer", "attention", "head", "norm")
SCALE = 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", *RANDOM])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--publications", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--change", type=float, default=0.003)
    args = parser.parse_args()
    print(f"{'model':24} {'dtype':9} {'case':12}" + "".join(f"{name:>11}" for name in STATISTICS), flush=True)
    spawn = multiprocessing.get_context("spawn")
    for model in args.models:
        for dtype in args.dtypes:
            process = spawn.Process(target=measure, args=(model, dtype, args.publications, args.repeats, args.change))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{model} in {dtype} failed")


def measure(model: str, dtype: str, publications: int, repeats: int, change: float) -> None:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as scratch, _open_unjudged(model, dtype, Path(scratch)) as worker:
        rng = np.random.default_rng(0)
        first = {n: t.detach().clone() for bucket in worker.trainer.iter_weights(1 << 30) for n, t in bucket}
        health = []
        for _ in range(publications):
            change_weights(worker, rng, change)
            worker.device.publish_weights(0)
            health.append(statistics_of(worker, rng))
        row(model, dtype, "healthy", [max(one[name] for one in health) for name in STATISTICS])
        row(model, dtype, "median", [float(np.median([one[name] for one in health])) for name in STATISTICS])
        for fault in FAULTS:
            found = []
            for _ in range(repeats):
                change_weights(worker, rng, change)
                worker.device.publish_weights(0)
                with planted(worker, fault, first):
                    found.append(statistics_of(worker, rng))
            row(model, dtype, fault, [min(one[name] for one in found) for name in STATISTICS])


def row(model: str, dtype: str, case: str, values: list[float]) -> None:
    print(f"{Path(model).name:24} {dtype:9} {case:12}" + "".join(f"{value:11.2e}" for value in values), flush=True)


def statistics_of(worker: Any, rng: np.random.Generator) -> dict[str, float]:
    """Of the weights that trainer and engine hold now."""
    sequences = worker.canary
    starts = [sequence.num_prompt_tokens - 1 for sequence in sequences]

    def both(ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        sides = (worker.trainer.score(ids), worker.engine.score(ids))
        ours, theirs = (np.concatenate([a[s:] for a, s in zip(side, starts, strict=True)]) for side in sides)
        return ours.astype(np.float64), theirs.astype(np.float64) - ours

    logprobs, apart = both([sequence.token_ids for sequence in sequences])
    others = []
    for ids, num_prompt in sequences:
        random = rng.integers(0, worker.vocab_size, len(ids) - num_prompt)
        others.append(np.concatenate([ids[:num_prompt], random]).astype(np.int32))
    weights, centered = np.exp(logprobs), logprobs - logprobs.mean()
    return {
        "mean": float(np.abs(apart).mean()),
        "max": float(np.abs(apart).max()),
        "weighted": float(np.average(np.abs(apart), weights=weights)),
        "slope": float(abs(apart @ centered) / max(centered @ centered, 1e-12)),
        "random": float(np.abs(both(others)[1]).max()),
    }


def change_weights(worker: Any, rng: np.random.Generator, share: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    with worker.device.training(), torch.no_grad():
        for parameter in worker.trainer.lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.float().pow(2).mean().sqrt()
            parameter.add_((share * scale * noise).to(parameter.dtype))


@contextmanager
def planted(worker: Any, fault: str, first: dict[str, Any]) -> Any:
    """The engine with a fault, until the next publication."""
    import torch

    engine, layer = worker.engine, "model.layers.0."
    model = engine._llm.apply_model(lambda m: m)[0]
    attention = [m.impl for m in model.modules() if hasattr(m, "impl") and hasattr(m.impl, "scale")]
    names = [name for name in engine.weight_names if name.startswith(layer)]
    with torch.no_grad():
        if fault == "layer":
            for name in names:
                engine.read_weight(name).copy_(first[name])
        elif fault == "other layer":
            for name in names:
                engine.read_weight(name).copy_(engine.read_weight(name.replace("layers.0", "layers.1")))
        elif fault == "attention":
            assert attention
            for impl in attention:
                impl.scale *= SCALE
        else:
            engine.read_weight("model.norm.weight" if fault == "head" else f"{layer}input_layernorm.weight").mul_(SCALE)
    try:
        yield
    finally:
        if fault == "attention":
            for impl in attention:
                impl.scale /= SCALE


@contextmanager
def open_worker(model: str, dtype: str, scratch: Path, *settings: str) -> Any:
    """A worker, with its canary as ``canary`` and its ``vocab_size``."""
    from rlpost.config.compose import load_config
    from rlpost.session import open_session
    from rlpost.workers import local

    overrides = ["recipe=math/arithmetic", f"model.dtype={dtype}", "device=cpu", *settings]
    with open_session_of(load_config(overrides), open_session) as session:
        made = session.worker_settings(needs_reference=False)
        if model != "demo":
            folder = write_random(model, scratch) if model in RANDOM else Path(model)
            made = settings_for(made, folder)
        worker = local.start_worker(made)
        worker.canary = worker.device._publisher._canary
        worker.vocab_size = made.vocab_size
        try:
            yield worker
        finally:
            worker.close()


def _open_unjudged(model: str, dtype: str, scratch: Path) -> Any:
    return open_worker(model, dtype, scratch, "canary_threshold=1e9")


@contextmanager
def open_session_of(cfg: Any, open_session: Any) -> Any:
    session = open_session(cfg)
    try:
        yield session
    finally:
        session.close()


def settings_for(settings: Any, folder: Path) -> Any:
    """The same for another model; its prompts are text where there is a tokenizer, else random tokens."""
    from dataclasses import replace

    shape = json.loads((folder / "config.json").read_text())
    vocabulary = int(shape["vocab_size"])
    if (folder / "tokenizer.json").exists() and vocabulary > 100:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        texts = ("What is 12 times 7?", "Name three rivers of Europe.", "Write a short poem.", "Why is the sky blue?")
        prompts = [
            np.array(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
                ),
                np.int32,
            )
            for text in texts
        ]
    elif vocabulary > 100:
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, vocabulary, 12).astype(np.int32) for _ in range(4)]
    else:
        prompts = list(settings.canary_prompts)
    return replace(
        settings,
        model_folder=str(folder.absolute()),
        vocab_size=vocabulary,
        hidden_size=int(shape["hidden_size"]),
        max_model_len=256,
        canary_prompts=prompts,
    )


def write_random(model_type: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(
        model_type,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        if name == "model.norm.weight":
            parameter.data *= 8
    model.save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    main()
