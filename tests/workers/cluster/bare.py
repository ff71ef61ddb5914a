"""Settings of workers that load no model."""

from __future__ import annotations

from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.workers.protocol import WorkerSettings


def settings_of(cfg: Config) -> WorkerSettings:
    return WorkerSettings(
        cfg=resolve(cfg, device="cpu", threads=1),
        model_folder="",
        vocab_size=18,
        num_params=1,
        hidden_size=1,
        needs_reference=False,
        max_model_len=8,
        canary_prompts=(),
    )
