"""Reward functions that misbehave in every way a worker must survive; imported in worker processes by file name."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from rlpost.rewards.failures import RewardFailure


def length(response, **_):
    return float(len(response))


def by_word(response, *, columns, **_):
    """Does what the response says; ``columns["folder"]`` is where it leaves traces."""
    word, _, rest = response.partition(" ")
    folder = Path(columns.get("folder", "."))
    if word == "sleep":
        time.sleep(float(rest))
    if word == "hold_the_gil":
        (folder / f"holds-{os.getpid()}").touch()
        10**10 ** int(rest)
    if word == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "exit":
        os._exit(0)
    if word == "raise":
        raise KeyError(rest)
    if word == "refuse":
        raise RewardFailure("no_judge", rest)
    if word == "nan":
        return float("nan")
    if word == "none":
        return None
    if word == "print":
        print("said by a reward", flush=True)
    if word == "daemon":  # leaves the process group, and its parent ends at once
        program = f"import os, time; os.setsid(); open({str(folder / 'daemon')!r}, 'w').write(str(os.getpid()));"
        subprocess.Popen([sys.executable, "-c", f"import os\nif os.fork() == 0:\n  {program} time.sleep(600)"]).wait()
        time.sleep(600)
    if word == "eat":
        return float(len(bytearray(int(rest))))
    if word == "once":  # fails the first time
        marker = folder / rest
        if not marker.exists():
            marker.touch()
            raise ValueError("not yet")
    if word == "modules":
        return {"heavy": float(any(name in sys.modules for name in ("torch", "transformers", "numpy"))), "reward": 1.0}
    if word == "env":
        return float(os.environ.get(rest, "-1"))
    if word == "pid":
        return float(os.getpid())
    return 1.0


async def slowly(response, **_):
    word, _, rest = response.partition(" ")
    if word == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "block":
        time.sleep(float(rest))  # noqa: ASYNC251 - the mistake this is about
    await asyncio.sleep(float(rest) if word == "sleep" else 0.2)
    return 1.0


slowly.concurrency = 4


class Closing:
    """Leaves a file when it is closed."""

    timeout_s = 0.5

    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, response, **_):
        time.sleep(float(response or 0))
        return 1.0

    def close(self):
        (self.folder / f"closed-{os.getpid()}").touch()


class Unmakeable:
    def __init__(self):
        raise OSError("no model file")


class DiesWhenMade:
    def __init__(self):
        os._exit(3)


class SlowToMake:
    def __init__(self):
        time.sleep(60)

    def __call__(self, response, **_):
        return 1.0


def rank_in_group(responses, *, reference, finish_reasons, **_):
    """1 for the longest of the group; no opinion about empty ones."""
    assert len(finish_reasons) == len(responses)
    longest = max(map(len, responses))
    return [None if not r else float(len(r) == longest) for r in responses]


# ---- rewards that start processes of their own ---------------------------------------------------------------------


def _endless(queue):
    while True:
        time.sleep(1)


def with_time_limit(response, **_):
    """A comparison with a time limit of its own: a child process that is terminated when it is late."""
    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=_endless, args=(queue,))
    process.start()
    process.join(float(response))
    if process.is_alive():
        process.terminate()
        process.join()
        return float(process.exitcode)
    return queue.get()


def in_a_pool(response, **_):
    """``POOL METHOD``: a pool of processes, made and ended within the call."""
    pool, method = response.split()
    context = multiprocessing.get_context(method)
    if pool == "executor":
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            return float(sum(executor.map(abs, [-1, -2, -3])))
    if pool == "thread":  # forks from a thread that is not the main one
        with ThreadPoolExecutor(2) as threads:
            return sum(threads.map(in_a_pool, [f"pool {method}"] * 2))
    with context.Pool(2) as workers:
        return float(sum(workers.map(abs, [-1, -2, -3])))


def interrupted(response, **_):
    """What a child does with a signal by its number: its exit status."""
    process = multiprocessing.Process(target=_endless, args=(None,))
    process.start()
    os.kill(process.pid, int(response))
    process.join()
    return float(process.exitcode)


def keeps_its_own_handler(response, **_):
    """A handler that the reward installs itself is inherited, as everywhere."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
    try:
        return interrupted("15")
    finally:
        signal.signal(signal.SIGTERM, before)
