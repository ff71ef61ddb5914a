"""Trained rollouts as files: one Parquet file per step, and a short table of them for trackers.

Owns the columns. Training never reads them (it reads the ledger). ``rlpost.reporting.metrics`` calls it after each
step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.types import Group, Sample

Decode = Callable[[Sequence[int]], str]
TABLE_COLUMNS = ["prompt", "response", "reward", "advantage", "tokens", "policy_versions", "finish_reason", "failure"]


def file_of(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}.parquet"


def to_rows(
    groups: Sequence[Group],
    advantages: Sequence[Any] | None,
    decode: Decode | None,
    old_logprobs: Sequence[Sequence[np.ndarray | None]] | None = None,
) -> list[dict[str, Any]]:
    """One row per sample, including failed ones.

    ``advantages`` are the algorithm's: f64[scored samples] per group, or one f64[R] per scored sample, whose mean over
    trainable tokens is then stored beside ``token_advantages``. A sample without a reward has None.
    ``old_logprobs`` are f32[R] per scored sample, if the trainer computed them at the start of the update.
    Tokens are authoritative; ``response`` is their decoded text (empty without a tokenizer).
    """
    rows = []
    for number, group in enumerate(groups):
        of_scored = iter(advantages[number] if advantages is not None else [])
        old_of_scored = iter(old_logprobs[number] if old_logprobs is not None else [])
        for sample in group.samples:
            trained = sample.reward is not None and advantages is not None
            token_ids = sample.token_ids
            rows.append(
                {
                    "uid": sample.uid,
                    "index": sample.index,
                    "prompt": group.prompt.text,
                    "response": decode(token_ids.tolist()) if decode is not None else "",
                    "prompt_token_ids": np.asarray(group.prompt.token_ids, np.int32),
                    "token_ids": token_ids,
                    "policy_versions": sample.policy_versions,
                    "rollout_logprobs": sample.rollout_logprobs,
                    "old_logprobs": next(old_of_scored, None) if sample.reward is not None else None,
                    "trainable": sample.trainable,
                    "mixed_kv": sample.mixed_kv,
                    "reward": sample.reward,
                    "reward_parts": json.dumps(dict(sample.reward_parts)),
                    "finish_reason": sample.finish_reason,
                    "failure": sample.failure,
                    **(_advantage_columns(next(of_scored), sample) if trained else {"advantage": None}),
                }
            )
        assert next(of_scored, None) is None, f"group {group.uid}: more advantages than samples with a reward"
    return rows


def _advantage_columns(value: Any, sample: Sample) -> dict[str, Any]:
    if np.ndim(value) == 0:
        return {"advantage": float(value)}
    mean = float(value[sample.trainable].mean()) if sample.trainable.any() else 0.0
    return {"advantage": mean, "token_advantages": np.asarray(value, np.float32)}


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows; the file appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = {
        "uid": pa.string(),
        "index": pa.int32(),
        "prompt": pa.string(),
        "response": pa.string(),
        "prompt_token_ids": pa.list_(pa.int32()),
        "token_ids": pa.list_(pa.int32()),
        "policy_versions": pa.list_(pa.int32()),
        "rollout_logprobs": pa.list_(pa.float32()),
        "old_logprobs": pa.list_(pa.float32()),  # null unless the trainer computed them (logging.trainer_logprobs)
        "trainable": pa.list_(pa.bool_()),
        "mixed_kv": pa.list_(pa.bool_()),
        "reward": pa.float64(),
        "reward_parts": pa.string(),  # JSON, since every recipe has its own
        "finish_reason": pa.string(),
        "failure": pa.string(),
        "advantage": pa.float64(),
    }
    if any("token_advantages" in row for row in rows):
        schema["token_advantages"] = pa.list_(pa.float32())
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(schema)), unfinished, compression="zstd")
    os.replace(unfinished, file)


def remove_after(run_dir: Path, step: int) -> None:
    """Delete the files of later steps, which a resumed run trains again."""
    for file in (run_dir / "rollouts").glob("step-*.parquet"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def to_table(rows: Sequence[Mapping[str, Any]], limit: int) -> tuple[list[str], list[list[Any]]]:
    """The first ``limit`` rows as (columns, values) for a tracker's table; each part of the reward has a column."""
    shown = [(row, json.loads(row["reward_parts"])) for row in rows[:limit]]
    names = sorted({name for _, parts in shown for name in parts})
    values = []
    for row, parts in shown:
        versions = " ".join(str(v) for v in dict.fromkeys(row["policy_versions"].tolist()))
        tail = [len(row["token_ids"]), versions, row["finish_reason"], row["failure"] or ""]
        head = [row["prompt"], row["response"], row["reward"], row["advantage"]]
        values.append([*head, *tail, *(parts.get(name) for name in names)])
    return [*TABLE_COLUMNS, *(f"reward: {name}" for name in names)], values
