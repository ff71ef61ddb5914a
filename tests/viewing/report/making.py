"""Run directories of any size with the files of a real run, made by a small simulation of APRIL with a virtual clock.

Answers are strings of the arithmetic task's characters, their lengths have a heavy tail, rewards rise. The timeline,
the rollouts and the metrics agree with each other: a sample's spans add up to its tokens.
"""

from __future__ import annotations

import heapq
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlpost.reporting.rollout_files import file_of, write
from rlpost.tasks.char_tokenizer import ARITHMETIC_CHARACTERS

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "rlpost" / "data" / "arithmetic"
RATE, UPDATE_S, PUBLISH_S, EVAL_S = 80.0, 1.5, 0.1, 4.0


@dataclass
class Life:
    """One sample under way; ``segments`` are (policy version, tokens)."""

    uid: str
    index: int
    wanted: int
    segments: list[tuple[int, int]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(tokens for _, tokens in self.segments)


@dataclass
class Simulation:
    random: np.random.Generator
    groups_per_step: int
    samples_per_group: int
    slots: int
    mean_length: float
    max_length: int
    drawn: int = 0
    waiting: list[Life] = field(default_factory=list)
    complete: dict[str, list[Life]] = field(default_factory=dict)

    def draw(self) -> None:
        uid = f"0:{self.drawn}"
        self.drawn += 1
        for index in range(self.samples_per_group):
            length = int(min(self.max_length, 2 + self.random.lognormal(np.log(self.mean_length), 0.8)))
            self.waiting.append(Life(uid, index, length))

    def roll_out(self, version: int, start: float) -> tuple[list[list[Life]], dict[str, list[Any]], float]:
        """(admitted groups, spans, end time)."""
        columns = ("uid", "index", "replica", "policy_version", "start_s", "end_s", "tokens", "kind", "end")
        spans: dict[str, list[Any]] = {name: [] for name in columns}
        running: list[tuple[float, int, float, Life]] = []
        admitted: list[list[Life]] = []
        clock, ticket = start, 0

        def record(life: Life, begun: float, end: float, tokens: int, how: str) -> None:
            kind = "resumed" if life.segments else "launched"
            values = (life.uid, life.index, 0, version, round(begun, 4), round(end, 4), tokens, kind, how)
            for name, value in zip(columns, values, strict=True):
                spans[name].append(value)
            life.segments.append((version, tokens))

        while len(admitted) < self.groups_per_step:
            while len(running) < self.slots:
                if not self.waiting:
                    self.draw()
                life = self.waiting.pop(0)
                ticket += 1
                heapq.heappush(running, (clock + (life.wanted - life.done) / RATE, ticket, clock, life))
            clock, _, begun, life = heapq.heappop(running)
            how = "length" if life.wanted >= self.max_length else "stop"
            record(life, begun, clock, life.wanted - life.done, how)
            members = self.complete.setdefault(life.uid, [])
            members.append(life)
            if len(members) == self.samples_per_group:
                admitted.append(sorted(self.complete.pop(life.uid), key=lambda m: m.index))
        paused = []
        for _, _, begun, life in sorted(running, key=lambda entry: entry[1]):
            tokens = int((clock - begun) * RATE)
            record(life, begun, clock, min(tokens, life.wanted - life.done - 1), "paused")
            paused.append(life)
        self.waiting = paused + self.waiting
        return admitted, spans, clock


def make_run(
    folder: Path,
    *,
    steps: int = 6,
    groups_per_step: int = 4,
    samples_per_group: int = 4,
    slots: int = 12,
    seed: int = 0,
    mean_length: float = 30.0,
    max_length: int = 192,
    timeline: bool = True,
    evals: bool = True,
    finished: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """The run directory ``folder``, as ``rlpost train`` leaves it."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    simulation = Simulation(random, groups_per_step, samples_per_group, slots, mean_length, max_length)
    clock, lines, lives = 0.5, [], []
    if evals:
        lines.append(_evaluation(0, clock, random, steps))
    totals = {"samples": 0, "tokens": 0}
    for step in range(1, steps + 1):
        published = clock + PUBLISH_S
        admitted, spans, end = simulation.roll_out(step - 1, published)
        rows = [row for group in admitted for row in _rows(group, random, step / steps)]
        write(file_of(folder, step), rows)
        totals["samples"] += len(rows)
        totals["tokens"] += sum(len(row["token_ids"]) for row in rows)
        updated = end + UPDATE_S
        phases = [["publish", clock, published], ["generate", published, end], ["update", end, updated]]
        lines.append(_step_line(step, rows, spans, (clock, published, end, updated), totals, slots))
        clock = updated
        if evals and (step % max(1, steps // 5) == 0 or step == steps):
            phases.append(["eval", clock, clock + EVAL_S])
            clock += EVAL_S
            lines.append(_evaluation(step, clock, random, steps))
        uids = [group[0].uid for group in admitted]
        lives.append({"step": step, "phases": phases, "spans": spans, "admitted": uids, "dropped": []})
    _write_lines(folder / "metrics.jsonl", lines)
    if timeline:
        _write_lines(folder / "timeline.jsonl", lives)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder.name, steps, seed, slots) | (config or {})))
    (folder / "model").mkdir()
    shutil.copy(TOKENIZER / "tokenizer.json", folder / "model")
    if finished:
        (folder / "finished.json").write_text(json.dumps({"steps": steps, "evaluations": []}))
    return folder


def _rows(group: list[Life], random: np.random.Generator, progress: float) -> list[dict[str, Any]]:
    rows = []
    for life in group:
        tokens = random.integers(0, len(ARITHMETIC_CHARACTERS), life.done).astype(np.int32)
        reward = float(random.random() < 0.4 + 0.5 * progress)
        rows.append(
            {
                "uid": life.uid,
                "index": life.index,
                "prompt": f"{life.uid[2:]}+1=?",
                "response": "".join(ARITHMETIC_CHARACTERS[token] for token in tokens),
                "prompt_token_ids": np.array([1, 10, 2], np.int32),
                "token_ids": tokens,
                "policy_versions": np.repeat(*np.array(life.segments, np.int32).T).astype(np.int32),
                "rollout_logprobs": -random.exponential(0.4, life.done).astype(np.float32),
                "trainable": np.ones(life.done, bool),
                "reward": reward,
                "reward_parts": json.dumps({"accuracy": reward, "shows_work": float(life.done > 20)}),
                "finish_reason": "stop",
                "failure": None,
                "advantage": reward - 0.5,
            }
        )
    return rows


def _step_line(
    step: int,
    rows: list[dict[str, Any]],
    spans: dict[str, list[Any]],
    times: tuple[float, float, float, float],
    totals: dict[str, int],
    slots: int,
) -> dict[str, Any]:
    began, published, end, updated = times
    rewards = [row["reward"] for row in rows]
    tokens = sum(len(row["token_ids"]) for row in rows)
    busy = sum(b - a for a, b in zip(spans["start_s"], spans["end_s"], strict=True))
    return {
        "step": step,
        "time_s": round(updated, 3),
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/failed": 0,
        "reward/part/accuracy": float(np.mean(rewards)),
        "reward/equal_groups_share": 0.1,
        "rollout/idle_share": max(0.0, 1 - busy / (slots * (end - published))),
        "rollout/consumed_tokens_per_s": tokens / (end - published),
        "rollout/generated_tokens_per_s": sum(spans["tokens"]) / (end - published),
        "rollout/carried_share": float(np.mean([v < step - 1 for row in rows for v in row["policy_versions"]])),
        "rollout/buffer_age": 0.4,
        "rollout/buffer_age_max": 1,
        "rollout/truncated_share": 0.02,
        "rollout/empty_share": 0.0,
        "rollout/length/admitted_mean": tokens / len(rows),
        "rollout/length/deferred_mean": 20.0,
        "rollout/length/launched_mean": 25.0,
        "loss/entropy": 0.5 * 0.99**step,
        "loss/approx_kl": 0.001,
        "loss/clip_low_share": 0.004,
        "loss/clip_high_share": 0.008,
        "loss/grad_norm": 1.0 + 0.1 * float(np.sin(step)),
        "loss/skipped_updates": 0,
        "loss/tokens": tokens,
        "mismatch/lag_0/abs_log_ratio": 3e-7,
        "total/samples": float(totals["samples"]),
        "total/tokens": float(totals["tokens"]),
        "time/publish": published - began,
        "time/generate": end - published,
        "time/update": updated - end,
        "time/step": updated - began,
    }


def _evaluation(step: int, clock: float, random: np.random.Generator, steps: int) -> dict[str, Any]:
    accuracy = 0.5 + 0.45 * (1 - np.exp(-3 * step / steps)) + float(random.normal(0, 0.01))
    return {
        "step": step,
        "time_s": round(clock, 3),
        "eval/accuracy": accuracy,
        "eval/accuracy_low": accuracy - 0.02,
        "eval/accuracy_high": min(1.0, accuracy + 0.02),
        "eval/response_tokens": 30.0,
        "eval/num_samples": 500,
        "time/eval": EVAL_S,
    }


def _config(name: str, steps: int, seed: int, slots: int) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "steps": steps,
        "description": "A simulated run.",
        "model": {"dtype": "float32"},
        "engine": {"max_slots": slots},
        "rollout": {"max_in_flight": None, "max_staleness": 4, "max_response_tokens": 192},
    }


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
