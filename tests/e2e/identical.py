"""Whether runs are, bit for bit, what they were before a rebuild: metrics, rollouts, ledger and weights, digested.

``identical.json`` holds the digests by processor, since the libraries' kernels round differently on each kind, and the
commit they were recorded from. A change that means to alter behavior records anew and says so in the CHANGELOG; any
other change must leave them alone, apart from the names in ``RENAMED``.

    python -m tests.e2e.identical record          this tree's digests, for this processor, into identical.json
    python -m tests.e2e.identical show FOLDER     what is digested, as text in FOLDER, for a diff of two trees
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from .account import ledger_rows
from .program import read_metrics, rlpost

FILE = Path(__file__).with_suffix(".json")
SAME = ["deterministic=true", "logging.wandb=disabled"]
SCENARIOS: dict[str, list[str]] = {
    "demo": ["train", "recipe=math/arithmetic", "steps=6"],
    "sync": ["train", "recipe=math/arithmetic", "steps=6", "rollout=sync"],
    "dapo": ["train", "recipe=math/arithmetic", "steps=6", "algo=dapo"],
    "two_updates_kl": [
        "train",
        "recipe=math/arithmetic",
        "steps=6",
        "train.optimizer_steps_per_rollout=2",
        "algo.kl_coef=0.01",
    ],
    "code": ["train", "recipe=code/humaneval_style", "steps=3"],
    "eval": ["eval", "recipe=math/arithmetic"],
}

# What has another name since the digests were recorded, new name -> old one: metrics, and columns of rollout files.
RENAMED: dict[str, str] = {}


def run_scenario(name: str, folder: Path) -> dict[str, str]:
    """What a scenario computed, by kind, as text; the run's files are left in ``folder``."""
    command, *settings = SCENARIOS[name]
    output = rlpost(command, *settings, *SAME, f"name={name}", cwd=folder)
    if command == "eval":
        return {"output": "\n".join(line for line in output.splitlines() if line.startswith(REPORTED))}
    run = folder / "runs" / name
    return {
        "metrics": _lines(_with_old_names(row) for row in read_metrics(run)),
        "rollouts": _lines(
            _with_old_names({"file": file.name, **row})
            for file in sorted((run / "rollouts").glob("step-*.parquet"))
            for row in parquet.read_table(file).to_pylist()
        ),
        "ledger": _lines([table, *map(repr, row)] for table, rows in ledger_rows(run).items() for row in rows),
        "weights": hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest(),
    }


REPORTED = ("problems", "mean@", "pass@", "length", "failed")  # of what `rlpost eval` prints; the rest names folders


def digest(facts: dict[str, str]) -> dict[str, str]:
    return {kind: hashlib.sha256(text.encode()).hexdigest()[:16] for kind, text in facts.items()}


def processor() -> str:
    """What decides which kernels the libraries choose."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    model = " ".join(known.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {"revision": "", "digests": {}}


def _with_old_names(row: dict[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in row.items()}


def _lines(rows: Any) -> str:
    return "\n".join(json.dumps(row, sort_keys=True, default=str) for row in rows)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        facts = {name: run_scenario(name, Path(folder)) for name in SCENARIOS}
    if arguments == ["record"]:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        kept = recorded()
        digests = kept["digests"] if kept["revision"] == revision.strip() else {}
        digests[processor()] = {name: digest(of_run) for name, of_run in facts.items()}
        FILE.write_text(json.dumps({"revision": revision.strip(), "digests": digests}, indent=1) + "\n")
    elif len(arguments) == 2 and arguments[0] == "show":
        for name, of_run in facts.items():
            for kind, text in of_run.items():
                file = Path(arguments[1]) / f"{name}.{kind}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text + "\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
