"""A run whose model, reward and names try to get out of the text they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from rlpost.reporting.rollout_files import file_of, write

from .making import make_run

# What a model may write; each must be seen on the page as text, or as a visible sign, and do nothing.
ANSWERS = {
    "script": "</script><script>document.body.dataset.owned='1';alert(1)</script>",
    "image": "<img src=x onerror=\"document.body.dataset.owned='1'\"><svg onload=alert(1)>",
    "comment": "<!-- <script> --> ]]> &lt;b&gt; &#x3c;",
    "template": "${document.body.dataset.owned=1} {{7*7}} %s \\u003cb\\u003e",
    "ansi": "\x1b[31mred\x1b[0m\x07\x08",
    "nul": "a\x00b, and so long that the tokens cannot be told apart",
    "right-to-left": "abc\u202egnp.exe\u2066 \u05e9\u05dc\u05d5\u05dd",
    "separators": "line\u2028paragraph\u2029end\u200b",
    "wide": "\U0001f600\u0301" * 3 + "W" * 3000,
}
SEEN = {
    "script": ANSWERS["script"],
    "image": ANSWERS["image"],
    "comment": ANSWERS["comment"],
    "template": ANSWERS["template"],
    "ansi": "\u241b[31mred\u241b[0m\u2407\u2408",
    "nul": "a\u2400b, and so long that the tokens cannot be told apart",
    "right-to-left": "abc\u27e8U+202E\u27e9gnp.exe\u27e8U+2066\u27e9 \u05e9\u05dc\u05d5\u05dd",
    "separators": "line\u27e8U+2028\u27e9paragraph\u27e8U+2029\u27e9end\u27e8U+200B\u27e9",
    "wide": ANSWERS["wide"],
}
ATTACK = "</title></script><img src=x onerror=\"document.body.dataset.owned='1'\">"


def make_hostile_run(folder: Path) -> Path:
    run = make_run(folder / "<img src=x onerror=alert(1)>", steps=2)
    rows = [
        {
            "uid": ATTACK,
            "index": index,
            "prompt": ATTACK,
            "response": answer,
            "prompt_token_ids": np.array([1], np.int32),
            "token_ids": np.array([3, 4, 5], np.int32),
            "policy_versions": np.array([0, 0, 1], np.int32),
            "rollout_logprobs": np.array([-0.1, np.nan, -np.inf], np.float32),
            "trainable": np.ones(3, bool),
            "reward": None if index == 0 else float("inf") if index == 1 else 1.0,
            "reward_parts": json.dumps({ATTACK: float("nan")}),
            "finish_reason": "stop",
            "failure": f"{ATTACK}: {ATTACK}" if index == 0 else None,
            "advantage": None,
        }
        for index, answer in enumerate(ANSWERS.values())
    ]
    write(file_of(run, 1), rows)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "time_s": 99.0, f"reward/part/{ATTACK.replace('/', '')}": 1.0}) + "\n")
    (run / "warnings.jsonl").write_text(json.dumps({"step": 1, "name": ATTACK, "text": "\ud800 " + ATTACK}) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"description": ATTACK, "user": {ATTACK: ATTACK}}))
    return run
