"""Settings of workers that load no model."""

from __future__ import annotations

from rlpost.config import Config
from rlpost.workers.protocol import WorkerSettings
from rlpost.workers.runtime import Runtime


def settings_of(cfg: Config) -> WorkerSettings:
    return WorkerSettings(
        cfg=cfg,
        runtime=Runtime(device="cpu", dtype="float32", threads=1),
        model_folder="",
        vocab_size=18,
        num_params=1,
        hidden_size=1,
        needs_reference=False,
        max_model_len=8,
        canary=(),
    )
