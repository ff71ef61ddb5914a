"""What a row of the table represents: the settings that affect what a run learns, as a digest.

A row whose digest differs from its cell's current one belongs to another study: it is neither used nor overwritten, and
the cell is run again. Called by ``study``. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from rlpost.config import Config, look_up, walk_fields
from rlpost.config.locations import resolve_path
from rlpost.durable.config_changes import is_harmless
from rlpost.prompts.sources import list_sources

# In addition to what a resume may change: keys that guard a run or control how its work is laid out, and change no
# sample.
SILENT = set(
    """recipe threads canary_threshold mismatch_stop model.shape model.revision data.long_prompts reward.workers
    reward.timeout_s reward.start_timeout_s reward.concurrency reward.memory_bytes reward.cache reward.cache_dir
    reward.max_failure_share engine.load_format train.sleep_offload train.logprob_chunk_tokens""".split()
)

# Settings that count even at their default: if a default changed, the rows would belong to another study. A key that
# the program gets later counts as soon as the recipe or a cell sets it.
FIXED = set(
    """deterministic device steps data.shuffle algo.advantage algo.advantage_eps algo.loss algo.clip_low algo.clip_high
    algo.dual_clip algo.reduction algo.kl_coef algo.entropy_coef algo.filter algo.correction algo.correction_cap
    algo.correction_floor algo.old_logprobs rollout.groups_per_step rollout.samples_per_group rollout.oversample
    rollout.adaptive_oversample rollout.max_staleness rollout.on_stale rollout.admission rollout.max_in_flight
    rollout.max_response_tokens rollout.temperature rollout.top_p rollout.top_k engine.max_slots engine.prefix_caching
    train.zero_stage train.optimizer_steps_per_rollout train.epochs train.lr train.betas train.eps train.weight_decay
    train.schedule train.warmup_steps train.final_lr_share train.grad_clip eval.every eval.samples_per_prompt
    eval.max_prompts eval.temperature eval.top_p eval.max_response_tokens eval.threshold""".split()
)


# Of FIXED, what is left open since: the value that a study's runs resolve it to, which was the default.
LEFT_OPEN = {"train.zero_stage": 1}


def settings_of(cfg: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    settings = {}
    for key in walk_fields():
        value = look_up(cfg, key.name)
        if is_dataclass(value) or key.name in SILENT or is_harmless(key.name):
            continue
        value = LEFT_OPEN.get(key.name) if value is None else value
        if value != key.default or key.name in FIXED:
            settings[key.name] = value
    return settings


def digest_settings(settings: dict[str, Any], material: str) -> str:
    """12 hex digits. ``material``: :func:`digest_material` of the model and the data."""
    return _hash(json.dumps([settings, material], sort_keys=True).encode())


def digest_material(cfg: Config) -> str:
    """Of the weights that training starts from and of the problems, training and held-out, in order."""
    parts = [file.read_bytes() for file in sorted(Path(resolve_path(cfg.model.path)).glob("*.safetensors"))]
    for source in (*list_sources(cfg.data, "train"), *list_sources(cfg.data, "eval")):
        rows = source.load(cfg.data.prompt_key)
        parts.append(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode())
    return _hash(*parts)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
