"""Parts of a check that end in every way there is; ``test_gpu_runner`` has them started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.record import Record, Settings


def passes(settings: Settings, record: Record, word: str = "none") -> None:
    record.note(word=word, device=settings.device, small=settings.small, third=1 / 3)


def does_not_hold(settings: Settings, record: Record) -> None:
    record.require(False, "two is not three")
    record.note(after=1)
    record.require(False, "nor four")


def raises(settings: Settings, record: Record) -> None:
    record.note(before=2)
    print("ValueError: an earlier one")
    raise RuntimeError("no kernel image\nis available")


def exits(settings: Settings, record: Record) -> None:
    sys.exit("gives up")


def dies(settings: Settings, record: Record) -> None:
    record.note(before=3)
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(settings: Settings, record: Record, pid_file: str) -> None:
    record.note(before=4)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(600)


def cannot_apply(settings: Settings, record: Record) -> None:
    record.skip("no such thing here")


def says_where(settings: Settings, record: Record) -> None:
    record.note(
        **{f"{key}_is": os.environ.get(key) for key in ("HF_HUB_OFFLINE", "WANDB_MODE", "CUDA_VISIBLE_DEVICES")}
    )
