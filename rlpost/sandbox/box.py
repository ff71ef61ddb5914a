"""The sandbox as rewards see it: programs in, outcomes out. Host side.

:class:`Sandbox` starts one guardian, lazily, and runs one program at a time in it. Programs, tests and outputs travel
as sealed in-memory files (memfd), which the guardian passes on unread. A program stopped by the wall clock is run once
more with no other program beside it; then it counts as stalled if it used no CPU, otherwise there is no outcome.

Waits for: the guardian's reply, which is bounded by the guardian's own limits (and GRACE_S beyond them, after which it
is killed); and, in ``turns``, for programs that must run alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlpost.errors import ConfigError, explain
from rlpost.sandbox import bubblewrap, script
from rlpost.sandbox.limits import Limits
from rlpost.sandbox.locks import Turns

START_S = 60.0  # bubblewrap, an interpreter, its imports; 0.3 s on an idle machine
GRACE_S = 60.0
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MAX_SOURCE_BYTES = 1 << 20  # of a program; nobody writes more by hand


class NoOutcome(Exception):
    """Nothing can be said about the program: the sandbox, the machine or the tests failed. ``kind`` in snake case."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of one program.

    ``kind``: passed (the tests passed; a script: exited by itself with status 0), or what went wrong: assertion,
    exception, bad_value, syntax, exited, crashed, time_limit, memory, output_limit, stalled.
    """

    kind: str
    text: str = ""  # for people: the exception, the signal
    num_passed: int = 0
    num_tests: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    output: bytes = b""  # of a script


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionTests:
    """``tests``: sources, each of asserts or with a ``check(candidate)``; ``entry_points``: None finds them by name."""

    tests: Sequence[str]
    entry_points: Sequence[str] | None
    helpers: str = ""  # the prompt, if the tests use its functions
    setup: str = ""
    partial: bool = False


class Sandbox:
    """One guardian and its children; a context manager. Can be reused after ``close`` and in a forked process."""

    def __init__(self, *, unsafe: bool = False, turns: Turns | None = None) -> None:
        """``unsafe``: on the bare host. Nothing is started before the first program, or ``start``."""
        self._unsafe = unsafe
        self._turns = turns
        self._lock = threading.Lock()
        self._guardian: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = os.getpid()

    # -- programs ----------------------------------------------------------------------------------------------------

    def run_functions(self, source: str, tests: FunctionTests, limits: Limits, *, prelude: str = "") -> Outcome:
        """Runs ``tests`` against the functions of ``source``. Raises NoOutcome, ConfigError (no sandbox here)."""
        if (refused := refuse_source(source)) is not None:
            return refused

        def attempt() -> tuple[dict[str, Any], bytes]:
            program = {"source": source, "prelude": prelude, "max_bytes": limits.output_bytes}
            bench = {**asdict(tests), "max_bytes": limits.output_bytes}
            with _Files(_to_json(program), _to_json(bench), None) as files:
                return self._request("functions", files.fds, limits), files.read(2)

        reply, written = self._attempt_twice(attempt, limits)
        return _functions_outcome(reply, written, limits)

    def run_script(self, source: str, stdin: bytes, limits: Limits) -> Outcome:
        """Runs ``source`` as a separate program; the caller compares ``output``. Raises like ``run_functions``."""
        if (refused := refuse_source(source)) is not None:
            return refused

        def attempt() -> tuple[dict[str, Any], bytes]:
            with _Files(_to_json({"source": source}), stdin, None) as files:
                return self._request("script", files.fds, limits), files.read(2)

        reply, written = self._attempt_twice(attempt, limits)
        return _script_outcome(reply, written, limits)

    def _attempt_twice(
        self, attempt: Callable[[], tuple[dict[str, Any], bytes]], limits: Limits
    ) -> tuple[dict[str, Any], bytes]:
        """Run it beside others; if the wall clock stopped it, once more alone."""
        with self._lock:
            self.start()
            assert self._turns is not None
            with self._turns.together():
                result = attempt()
            if result[0]["stopped"] == "wall":
                with self._turns.alone():
                    result = attempt()
                used = sum(program["cpu_s"] for program in result[0]["programs"].values())
                if result[0]["stopped"] == "wall" and used >= limits.stalled_cpu_s:
                    detail = f"{limits.wall_s:.0f} s were not enough for {limits.cpu_s:g} s of CPU time"
                    raise NoOutcome("overload", f"{detail} (used {used:.2f} s), twice, the second time alone")
            return result

    # -- the guardian --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the guardian if none is running. Raises ConfigError if this machine allows no sandbox."""
        if self._guardian is not None and self._owner == os.getpid() and self._guardian.poll() is None:
            return
        self._forget()
        self._turns = self._turns or Turns()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            make = bubblewrap.unsafe_command if self._unsafe else bubblewrap.sandboxed_command
            self._guardian = subprocess.Popen(
                make(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=bubblewrap.unsafe_environment() if self._unsafe else {},
                cwd="/",
            )
        self._control, self._owner = ours, os.getpid()
        try:
            hello = self._await_reply(START_S)
        except NoOutcome as error:
            hello = {"error": error.detail}
        if "error" in hello:
            said = self._stop()
            raise ConfigError(_describe_refusal(said or hello["error"]))

    def _request(self, kind: str, fds: Sequence[int], limits: Limits) -> dict[str, Any]:
        self.start()
        assert self._control is not None
        try:
            message = _to_json({"kind": kind, "limits": asdict(limits)})
            socket.send_fds(self._control, [message], list(fds))
            reply = self._await_reply(limits.wall_s + GRACE_S)
        except OSError as error:
            self._stop()
            raise NoOutcome("sandbox_error", f"{type(error).__name__}: {error}") from None
        except BaseException:  # interrupted midway: the next reply would be for this request
            self._stop()
            raise
        if "error" in reply:
            self._stop()
            raise NoOutcome("sandbox_error", reply["error"])
        return reply

    def _await_reply(self, timeout_s: float) -> dict[str, Any]:
        assert self._control is not None
        self._control.settimeout(timeout_s)
        try:
            message = self._control.recv(1 << 16)
        except TimeoutError:
            raise NoOutcome("sandbox_error", f"the sandbox did not respond for {timeout_s:.0f} s") from None
        except OSError as error:
            raise NoOutcome("sandbox_error", str(error)) from None
        if not message:
            raise NoOutcome("sandbox_error", "the sandbox ended")
        return json.loads(message)

    def _stop(self) -> str:
        """Kills the guardian and everything inside; returns the end of its standard error."""
        guardian, self._guardian = self._guardian, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if guardian is None:
            return ""
        guardian.kill()
        assert guardian.stderr is not None
        with guardian.stderr:
            said = guardian.stderr.read()
        guardian.wait()
        return " ".join(said.decode("utf-8", "replace").split())[-400:]

    def _forget(self) -> None:
        """Drops a guardian that ended, or that belongs to the process this one was forked from."""
        if self._guardian is not None and self._owner != os.getpid():
            self._guardian.returncode = 0  # not our child: neither wait for it nor warn about it
            self._guardian, self._control, self._turns = None, None, None
        self._stop()

    def close(self) -> None:
        with self._lock:
            self._forget()
            if self._turns is not None:
                self._turns.close()
                self._turns = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_source(source: str) -> Outcome | None:
    """The outcome of a source that is not even run; None to run it."""
    if len(source) > MAX_SOURCE_BYTES:
        return Outcome(kind="syntax", text=f"{len(source)} characters, more than {MAX_SOURCE_BYTES}")
    return None


class _Files:
    """In-memory files for one run: sealed ones with content, and empty ones (None) to be written inside."""

    def __init__(self, *contents: bytes | None) -> None:
        self.fds = [_make_file(content) for content in contents]

    def read(self, index: int) -> bytes:
        size = os.fstat(self.fds[index]).st_size
        return os.pread(self.fds[index], size, 0)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


def _make_file(content: bytes | None) -> int:
    fd = os.memfd_create("rlpost", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if content is not None:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---- from the guardian's reply to an outcome -------------------------------------------------------------------------


def _functions_outcome(reply: dict[str, Any], written: bytes, limits: Limits) -> Outcome:
    program, bench = reply["programs"]["candidate"], reply["programs"]["tester"]
    report = json.loads(written) if written else {}
    counts: dict[str, Any] = {"num_passed": report.get("num_passed", 0), "num_tests": report.get("num_tests", 0)}
    counts |= {"cpu_s": program["cpu_s"], "wall_s": reply["wall_s"]}
    ended = _failure_of(reply, "candidate", limits)
    if ended is not None and ended[0] in ("time_limit", "stalled"):
        return Outcome(kind=ended[0], text=ended[1], **counts)
    if reply["stopped"] == "tester" or bench["cpu_s"] > limits.for_tester().cpu_s:
        return Outcome(kind="time_limit", text="in the tests", **counts)
    if not report:
        raise NoOutcome("tester_crash", f"the tests' process ended without an outcome: {_describe_end(bench)}")
    if report["kind"] == "bad_tests":
        raise NoOutcome("bad_tests", report["text"])
    if report["kind"] == "gone":
        kind, text = ended or ("exited", "")
        return Outcome(kind=kind, text=text, **counts)
    return Outcome(kind=report["kind"], text=report["text"], **counts)


def _script_outcome(reply: dict[str, Any], written: bytes, limits: Limits) -> Outcome:
    cpu_s = reply["programs"]["script"]["cpu_s"]
    kind, text = _failure_of(reply, "script", limits) or ("passed", "")
    if len(written) >= limits.output_bytes and kind not in ("time_limit", "stalled"):
        kind, text = "output_limit", f"{limits.output_bytes} bytes"
    return Outcome(kind=kind, text=text, cpu_s=cpu_s, wall_s=reply["wall_s"], output=written)


def _failure_of(reply: dict[str, Any], role: str, limits: Limits) -> tuple[str, str] | None:
    """(kind, text) of a program that failed; None for one that did not, or that was ended when it was done."""
    program = reply["programs"][role]
    if reply["stopped"] == role or program["cpu_s"] > limits.cpu_s:
        return "time_limit", f"{program['cpu_s']:.2f} s of {limits.cpu_s:g} s of CPU time"
    if reply["stopped"] == "wall":
        return "stalled", f"no CPU used in {limits.wall_s:.0f} s"
    if program["killed"]:
        return None
    if program["signal"] == signal.SIGKILL:  # not sent by us, and nothing inside can send it
        raise NoOutcome("killed", "the machine killed the program (out of memory?)")
    if program["signal"] is not None:
        return "crashed", _describe_end(program)
    if program["exit"] == script.EXIT_MEMORY:
        return "memory", f"{limits.memory_bytes} bytes"
    if program["exit"] == script.EXIT_SYNTAX:
        return "syntax", ""
    if program["exit"] != 0:
        return ("exited" if role == "candidate" else "exception"), _describe_end(program)
    return ("exited", "status 0") if role == "candidate" else None


def _describe_end(program: dict[str, Any]) -> str:
    if program["signal"] is not None:
        return f"signal {program['signal']}"
    return f"status {program['exit']}"


def _describe_refusal(reason: str) -> str:
    do = f"allow user namespaces, or set {bubblewrap.UNSAFE_OPTION}=true if the code is trusted (docs/sandbox.md)"
    return explain("sandbox", reason, "a kernel that isolates programs (user namespaces, seccomp)", do)
