"""A hang ends the process with its stacks and the phase's name; progress keeps it alive."""

import subprocess
import sys
import time

from rlpost.workers.watchdog import EXIT_CODE, Watchdog


def test_a_hang_is_named_and_ends_the_process():
    code = (
        "import time; from rlpost.workers.watchdog import Watchdog; w = Watchdog(0.4); w.beat('update')\n"
        "def hang_here():\n    time.sleep(30)\nhang_here()"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.returncode == EXIT_CODE and time.monotonic() - started < 20
    assert "no progress in phase 'update'" in done.stderr and "hang_here" in done.stderr


def test_progress_keeps_it_quiet():
    watchdog = Watchdog(0.5)
    for _ in range(8):
        time.sleep(0.1)
        watchdog.beat()
    watchdog.close()
