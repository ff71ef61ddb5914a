"""One publication in small: the real trainer and the real engine on a tiny random model that is made here.

``main([device, dtype])`` runs in a fresh interpreter, called by ``doctor.programs``. Stages, each reported: the imports
one by one, ``workers`` (trainer and engine start), ``publication`` (weights copied, compared bit for bit, canary),
``response`` (the engine samples a few tokens).
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.doctor.programs import Reports
from rlpost.models.shape import count_params
from rlpost.workers.runtime import require_usable, write_environment

IMPORTS = ("torch", "transformers", "deepspeed", "vllm")
SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MAX_MODEL_LEN, NUM_TOKENS = 128, 8


def main(arguments: Sequence[str]) -> None:
    device, dtype = arguments
    reports = Reports()
    cfg = small_config(device, dtype)
    write_environment(device=device, dtype=dtype, threads=1, vocab_size=int(SHAPE["vocab_size"]))  # type: ignore[call-overload]
    if all(reports.attempt(name, lambda name=name: _import(name)) for name in IMPORTS):  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as folder:
            _publish(cfg, Path(folder), reports)
    reports.end()


def small_config(device: str, dtype: str) -> Config:
    cfg = Config()
    cfg = replace(
        cfg,
        steps=1,
        model=replace(cfg.model, dtype=dtype),
        # The engine's own weights do not matter: the publication replaces them.
        engine=replace(cfg.engine, max_slots=4, enforce_eager=True, load_format="dummy"),
    )
    return resolve(cfg, device=device, threads=1)


def _import(name: str) -> dict[str, Any]:
    began = time.perf_counter()
    importlib.import_module(name)
    return {"seconds": time.perf_counter() - began}


def _publish(cfg: Config, folder: Path, reports: Reports) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    worker: list[Any] = []

    def start() -> dict[str, Any]:
        worker.append(_start(cfg, folder))
        return {"attention": attention_backends(worker[0].engine)}

    def publish() -> dict[str, Any]:
        publication = worker[0].device.publish_weights(0)
        return {"bytes": publication.num_bytes, "canary": publication.canary_mean, "threshold": cfg.canary_threshold}

    if reports.attempt("workers", start) and reports.attempt("publication", publish):
        reports.attempt("response", lambda: _respond(worker[0].engine))


def _start(cfg: Config, folder: Path) -> Any:
    import numpy as np

    from rlpost.workers.local import start_worker
    from rlpost.workers.protocol import WorkerSettings

    require_usable(cfg.device)
    vocabulary, hidden = int(SHAPE["vocab_size"]), int(SHAPE["hidden_size"])  # type: ignore[call-overload]
    prompts = [np.arange(8, dtype=np.int32), np.arange(40, 60, dtype=np.int32)]
    return start_worker(
        WorkerSettings(
            cfg=cfg,
            model_folder=str(folder),
            vocab_size=vocabulary,
            num_params=count_params(SHAPE),
            hidden_size=hidden,
            needs_reference=False,
            max_model_len=MAX_MODEL_LEN,
            canary_prompts=prompts,
            init="random",
        )
    )


def attention_backends(engine: Any) -> list[str]:
    """The names of those that vLLM chose for the model's layers."""
    (model,) = engine._llm.apply_model(lambda model: model)
    chosen = (getattr(module, "attn_backend", None) for module in model.modules())
    return sorted({backend.get_name() for backend in chosen if backend is not None})


def _respond(engine: Any) -> dict[str, Any]:
    import numpy as np

    from rlpost.engine.protocol import Request, SamplingSettings

    prompt = np.arange(5, dtype=np.int32)
    engine.submit([Request("doctor", [prompt], max_new_tokens=NUM_TOKENS, seed=0, sampling=SamplingSettings())])
    tokens = 0
    while engine.num_in_flight:
        tokens += sum(len(delta.token_ids) for delta in engine.step().deltas)
    assert tokens == NUM_TOKENS, f"{tokens} tokens in place of {NUM_TOKENS}"
    return {"tokens": tokens}
