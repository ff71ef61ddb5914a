#!/usr/bin/env bash
# The demo cut short, with its accuracy and the ledger's cost asserted. Called by `make demo-ci`, from the top folder.
# 14 of 30 steps and half of the evaluation; seeds 0 to 2 reached 85 to 86 % after 10 steps of the whole demo.
set -euo pipefail
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

.venv/bin/rlpost train recipe=math/arithmetic device=cpu name=demo-ci runs_dir="$runs" steps=14 eval.every=0 \
    eval.max_prompts=250 logging.progress=lines

.venv/bin/python - "$runs/demo-ci/metrics.jsonl" <<'PYTHON'
import json
import statistics
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
before, after = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
tokens = [row["eval/response_tokens"] for row in rows if "eval/accuracy" in row]
ledger = statistics.median(row["time/ledger"] / row["time/step"] for row in rows if "time/ledger" in row)
print(f"demo-ci: the ledger took {100 * ledger:.2f} % of a step, median")
if ledger > 0.02:
    sys.exit("demo-ci: expected the ledger to take at most 2 % of a step")
print(f"demo-ci: accuracy {before:.3f} before, {after:.3f} after; answers of {tokens[0]:.0f} tokens, then {tokens[1]:.0f}")
if after < 0.80 or after < before + 0.20 or tokens[1] < tokens[0] + 5:
    sys.exit("demo-ci: expected 80 % accuracy, a lift of 20 points and longer answers")
PYTHON
