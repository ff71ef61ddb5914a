"""The program of a reward worker: a process that calls reward functions and nothing else.

Waits for: a frame from the run (a length and JSON) on one socket, and also for async calls while any are running. Ends
when the socket closes, or when the run dies (the kernel then kills it). It does not enforce deadlines on sync code: the
run kills it. Started by ``rewards.worker_pool``, before the run imports anything heavy.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpost.config import RewardConfig
from rlpost.errors import UserError
from rlpost.rewards.child_signals import SIGNALS, keep_from_children
from rlpost.rewards.functions import LoadedFunction, Question, Response, load_functions
from rlpost.rewards.outcomes import Outcome, shorten

HEADER = struct.Struct(">I")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def encode_frame(message: Any) -> bytes:
    """A message in wire format; only JSON values, including lone surrogates."""
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


class Channel:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        self._socket.sendall(encode_frame(message))

    def receive(self) -> Any:
        """The next message; None if the run has closed its end."""
        header = self._read(HEADER.size)
        body = header and self._read(*HEADER.unpack(header))
        return json.loads(body) if body else None

    def _read(self, count: int) -> bytes:
        chunks = []
        while count:
            chunk = self._socket.recv(min(count, 1 << 20))
            if not chunk:
                return b""
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)


def main(descriptor: int, parent: int) -> None:
    """``descriptor`` is the socket's, ``parent`` the run's process id."""
    _leave_the_terminal(parent)
    os.set_inheritable(descriptor, False)  # processes started by a reward must neither hold the socket nor write to it
    channel = Channel(socket.socket(fileno=descriptor))
    setup = channel.receive()
    if setup is None:
        return
    sys.path[:] = setup["path"]
    cfg = RewardConfig(**setup["reward"])
    if cfg.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (cfg.memory_bytes, cfg.memory_bytes))
    functions: list[LoadedFunction] = []
    try:
        functions = load_functions(cfg, setup["reference_key"], Path(setup["folder"]))
        channel.send({"ready": [asdict(function.facts) for function in functions]})
    except UserError as error:
        channel.send({"broken": str(error)})
    except (Exception, SystemExit) as error:  # a user's class may fail in any way while it is constructed
        channel.send({"broken": shorten(f"reward: constructing the function failed: {type(error).__name__}: {error}")})
    if functions:
        serve(channel, functions)
    for function in functions:
        function.close()


def serve(channel: Channel, functions: list[LoadedFunction]) -> None:
    """Handle calls until the run closes the socket; several at once if the function is async."""
    while (call := channel.receive()) is not None:
        function = functions[call["function"]]
        if function.facts.is_async:
            if not function.loop.run_until_complete(_serve_async(channel, function, call)):
                return
        else:
            channel.send(_reply(call, function.score(*_read_call(call))))


async def _serve_async(channel: Channel, function: LoadedFunction, first: Any) -> bool:
    """Run this call and others of the same function that arrive meanwhile; False when the run is gone.

    Sync code never runs in here: a reward may start a loop of its own.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    closed = False

    async def handle(call: Any) -> None:
        channel.send(_reply(call, await function.score_async(*_read_call(call))))

    def start(call: Any) -> None:
        tasks.add(loop.create_task(handle(call)))

    def on_readable() -> None:
        nonlocal closed
        call = channel.receive()
        if call is None:
            closed = True
            loop.remove_reader(channel.fileno())
            for task in tasks:
                task.cancel()
        else:
            start(call)

    start(first)
    loop.add_reader(channel.fileno(), on_readable)
    while tasks:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks -= done
        for task in done:
            if not task.cancelled():
                task.result()  # a broken socket ends the worker
    loop.remove_reader(channel.fileno())
    return not closed


def _read_call(call: Any) -> tuple[Question, list[Response]]:
    return Question(**call["question"]), [Response(**response) for response in call["responses"]]


def _reply(call: Any, outcomes: list[Outcome]) -> dict[str, Any]:
    return {"number": call["number"], "outcomes": [asdict(outcome) for outcome in outcomes]}


def _do_nothing(number: int, frame: Any) -> None:
    """Handler of the signals that are the run's business."""


def _leave_the_terminal(parent: int) -> None:
    """Ctrl-C and termination signals are handled by the run; if it dies, in any way, this process must die too.

    The signals get a no-op handler: if they were ignored, everything a reward starts would ignore them, too.
    Forked children get the default (``child_signals``).
    """
    for number in SIGNALS:
        signal.signal(number, _do_nothing)
    keep_from_children(dict.fromkeys(SIGNALS, _do_nothing))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_CHILD_SUBREAPER, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    if os.getppid() != parent:  # it died before prctl took effect
        os._exit(1)
