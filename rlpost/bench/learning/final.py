"""The trained model's evaluation, in a separate process.

    python -m rlpost.bench.learning.final OUT.json key=value ...

Writes counts that can be added up and compared, unlike the text printed by ``rlpost eval``. Called by ``run``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from rlpost.config.compose import load_config
from rlpost.evaluate import run_eval


def main(out: str, *overrides: str) -> None:
    cfg = load_config(list(overrides))
    result = run_eval(cfg)
    correct: list[int] = []
    incorrect: list[int] = []
    for _, sample in result.samples:
        if sample.reward is not None:
            score = sample.reward_parts.get("accuracy", sample.reward)
            (correct if score > cfg.eval.threshold else incorrect).append(sample.num_tokens)
    counts = {
        "num_correct": len(correct),
        "num_judged": len(correct) + len(incorrect),
        "problems": len(result.correct),
        "response_tokens": result.mean_response_tokens,
        "truncated_share": result.truncated_share,
        "right_tokens": float(np.mean(correct)) if correct else 0.0,
        "wrong_tokens": float(np.mean(incorrect)) if incorrect else 0.0,
    }
    Path(out).write_text(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
