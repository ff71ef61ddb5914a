#!/usr/bin/env bash
# The demo cut short, with its accuracy asserted. Called by `make demo-ci`, from the top folder.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHDYNAMO_DISABLE=1 WANDB_MODE=offline
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

.venv/bin/rlpost train recipe=math/arithmetic name=demo-ci runs_dir="$runs" steps=12 \
    eval.max_prompts=200 eval.samples_per_prompt=1 logging.progress=lines

.venv/bin/python - "$runs/demo-ci/metrics.jsonl" <<'PYTHON'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
print(f"demo-ci: accuracy {accuracy[0]:.3f} before, {accuracy[-1]:.3f} after")
if len(accuracy) < 2 or accuracy[-1] < accuracy[0] + 0.15:
    sys.exit("demo-ci: expected a lift of at least 15 points")
PYTHON
