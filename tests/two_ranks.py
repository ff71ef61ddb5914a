"""A program run by two ranks, a process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_two_ranks(program: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> list[Any]:
    """Both ranks' results, ``folder/results-RANK.pt``, of ``python program ARGUMENTS... RANK FOLDER``.

    ``program``: a path in ``tests``. The end of their stderr is the failure's message.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, str(ROOT / "tests" / program), *arguments]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=variables, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=800)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]
