"""The program of a reward worker: a process that calls reward functions and nothing else.

Waits for: a frame from the run (a length and JSON) on one socket, and while async calls are under way for those too.
Ends when the socket closes, or when the run dies (the kernel kills it then). A deadline for sync code is not its own
business: the run kills it. Started by ``rewards.worker_pool``, before the run imports anything heavy.
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
from typing import Any

from rlpost.config import RewardConfig
from rlpost.errors import UserError
from rlpost.rewards.child_signals import SIGNALS, keep_from_children
from rlpost.rewards.functions import LoadedFunction, Question, Response, load_functions
from rlpost.rewards.outcomes import Outcome, shorten

HEADER = struct.Struct(">I")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def encode_frame(message: Any) -> bytes:
    """A message as it lies on the socket; only JSON values, half surrogate pairs included."""
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
        """The next message; None when the run has closed its end."""
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
    os.set_inheritable(descriptor, False)  # what a reward starts must not hold the socket open, or write to it
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
        functions = load_functions(cfg, setup["reference_key"])
        channel.send({"ready": [asdict(function.facts) for function in functions]})
    except UserError as error:
        channel.send({"broken": str(error)})
    except (Exception, SystemExit) as error:  # a user's class may fail in any way while it is made
        channel.send({"broken": shorten(f"reward: making the function failed: {type(error).__name__}: {error}")})
    if functions:
        serve(channel, functions)
    for function in functions:
        function.close()


def serve(channel: Channel, functions: list[LoadedFunction]) -> None:
    """Answers calls until the run closes the socket; several at once where the function is async."""
    while (call := channel.receive()) is not None:
        function = functions[call["function"]]
        if function.facts.is_async:
            if not function.loop.run_until_complete(_serve_async(channel, function, call)):
                return
        else:
            channel.send(_reply(call, function.judge(*_read_call(call))))


async def _serve_async(channel: Channel, function: LoadedFunction, first: Any) -> bool:
    """This call and others of the same function that come while one is under way; False when the run is gone.

    Sync code never runs inside: a reward may start a loop of its own.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    closed = False

    async def answer(call: Any) -> None:
        channel.send(_reply(call, await function.judge_async(*_read_call(call))))

    def start(call: Any) -> None:
        tasks.add(loop.create_task(answer(call)))

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
                task.result()  # a socket that broke ends the worker
    loop.remove_reader(channel.fileno())
    return not closed


def _read_call(call: Any) -> tuple[Question, list[Response]]:
    return Question(**call["question"]), [Response(**response) for response in call["responses"]]


def _reply(call: Any, outcomes: list[Outcome]) -> dict[str, Any]:
    return {"number": call["number"], "outcomes": [asdict(outcome) for outcome in outcomes]}


def _do_nothing(number: int, frame: Any) -> None:
    """Handler of the signals that are the run's business."""


def _leave_the_terminal(parent: int) -> None:
    """Ctrl-C and the run's end by signal are the run's business; its death is ours, however it comes.

    The signals get a handler that does nothing: an ignored one would be ignored by everything a reward starts, too.
    Forked children get the default (``child_signals``).
    """
    for number in SIGNALS:
        signal.signal(number, _do_nothing)
    keep_from_children(dict.fromkeys(SIGNALS, _do_nothing))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_CHILD_SUBREAPER, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)
