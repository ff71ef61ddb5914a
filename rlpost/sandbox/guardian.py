"""The first process inside the sandbox: forks a child per program, counts its CPU time, kills it.

Standard library only. Trusted, and deliberately ignorant: programs, tests and outputs pass through here as descriptors
that it never reads, so a child forked from it finds nothing in its memory (not even of earlier programs) that a program
must not know.

Each child is the first process of its own pid namespace. It cannot name, see or signal anything outside, and when it
is killed the kernel kills everything it started, including daemons, before the child counts as gone.

Waits for: the host's next request; while programs run, for them to end, for the CPU and wall limits, and for the host's
end of the socket to close, which ends the guardian and everything inside.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlpost.sandbox import candidate, confine, linux, script, seccomp, tester
from rlpost.sandbox.limits import Limits

NOBODY = 65534
MAX_MESSAGE, MAX_FDS = 1 << 16, 8
MIN_POLL_S, MAX_POLL_S = 0.005, 0.25
GONE_S = 1.0  # how long a candidate may take to end after its tester saw it leave
CONFINED = b"+"  # what a child reports before its program begins
# What HumanEval-sized programs import; each import costs milliseconds that a fork then saves.
PRELOADED = (
    "abc array ast bisect calendar cmath collections collections.abc copy csv dataclasses datetime decimal enum "
    "fractions functools hashlib heapq inspect io itertools json math numbers operator queue random re site statistics "
    "string struct sys textwrap threading time traceback types typing unicodedata"
).split()


@dataclass
class Program:
    """A running child."""

    role: str
    pid: int
    pidfd: int
    report_fd: int  # receives the child's CONFINED, or what failed
    cpu_limit_s: float
    ended: dict[str, Any] | None = None  # cpu_s, exit, signal

    def cpu_s(self) -> float:
        return self.ended["cpu_s"] if self.ended else linux.cpu_seconds(self.pid)


class Guardian:
    """Serves one host, one request at a time."""

    def __init__(self, control: socket.socket, *, namespaces: bool) -> None:
        self._control = control
        self._namespaces = namespaces
        proc = f"{confine.HOME}/proc" if namespaces else "/proc"
        self._own_pids = os.open(f"{proc}/self/ns/pid", os.O_RDONLY)
        self._null = os.open("/dev/null", os.O_RDWR)
        self._filter = seccomp.assemble(platform.machine())
        self._base_bytes = _address_space(proc)

    def serve(self) -> None:
        while True:
            request, fds = self._receive()
            if request is None:
                return
            try:
                reply = self._run(request, fds)
            except OSError as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            finally:
                for fd in fds:
                    os.close(fd)
            self._control.send(json.dumps(reply).encode())

    def _receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        message, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, MAX_FDS)
        return (json.loads(message) if message else None), fds

    def _run(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        limits = Limits(**request["limits"])
        programs: list[Program] = []
        started = time.monotonic()
        try:
            if request["kind"] == "functions":
                self._start_pair(programs, fds, limits)
            else:
                source, stdin, stdout = fds
                programs.append(self._start("script", [stdin, stdout, self._null, source], limits, script.run))
            stopped = self._watch(programs, started + limits.wall_s)
        finally:
            for program in programs:
                self._end(program)
        return {
            "stopped": stopped,
            "wall_s": time.monotonic() - started,
            "programs": {program.role: program.ended for program in programs},
        }

    def _start_pair(self, programs: list[Program], fds: list[int], limits: Limits) -> None:
        """A candidate and its tester, connected by two pipes."""
        source, tests, outcome = fds
        null, pipes = self._null, []
        try:
            pipes = [*os.pipe(), *os.pipe()]
            calls_out, calls_in, results_out, results_in = pipes
            given = [null, null, null, calls_out, results_in, source]
            programs.append(self._start("candidate", given, limits, candidate.run))
            given = [null, null, null, results_out, calls_in, tests, outcome]
            programs.append(self._start("tester", given, limits.for_tester(), tester.run))
        finally:
            for fd in pipes:
                os.close(fd)

    def _start(self, role: str, fds: list[int], limits: Limits, body: Callable[[], None]) -> Program:
        if self._namespaces:
            linux.unshare(linux.CLONE_NEWPID)  # for the next child
        report_out, report_in = os.pipe2(os.O_NONBLOCK)
        pid = os.fork()
        if pid == 0:
            self._become([*fds, report_in], limits, body)
        os.close(report_in)
        if self._namespaces:
            linux.set_namespace(self._own_pids, linux.CLONE_NEWPID)  # later children start in our namespace again
        return Program(role, pid, os.pidfd_open(pid), report_out, limits.cpu_s)

    def _become(self, fds: list[int], limits: Limits, body: Callable[[], None]) -> None:
        """The child: never returns. The last of ``fds`` is for its report and is closed before the program begins."""
        status, report = script.EXIT_RAISED, len(fds) - 1
        try:
            confine.keep_only(fds)
            try:
                confine.confine(
                    limits, base_bytes=self._base_bytes, filter_code=self._filter, namespaces=self._namespaces
                )
            except BaseException as error:
                os.write(report, f"{type(error).__name__}: {error}".encode())
                raise
            os.write(report, CONFINED)
            os.close(report)
            gc.enable()
            body()
        except MemoryError:
            status = script.EXIT_MEMORY
        finally:
            os._exit(status)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, programs: list[Program], deadline: float) -> str | None:
        """Wait until the last program (the tester, or the script) has ended or something stops it.

        Returns what stopped it: the role of the program that ran out of CPU time, ``wall``, or None.
        """
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        for program in programs:
            waiting.register(program.pidfd, select.POLLIN)
        last_look = float("inf")
        while True:
            for program in programs:
                if program.cpu_s() > program.cpu_limit_s:
                    return program.role
            now = time.monotonic()
            running = [program for program in programs if not program.ended]
            if not running or now >= last_look:
                return None
            if now >= deadline:
                return "wall"
            budget = min(program.cpu_limit_s - program.cpu_s() for program in running)
            pause = min(max(budget / 2, MIN_POLL_S), MAX_POLL_S, deadline - now, last_look - now)
            ready = {fd for fd, _ in waiting.poll(1000 * pause)}
            if self._control.fileno() in ready:  # the host went away, or broke the protocol
                os._exit(0)  # the kernel ends everything else in this pid namespace
            for program in running:
                if program.pidfd in ready:
                    self._reap(program)
                    waiting.unregister(program.pidfd)
            if programs[-1].ended:
                gone = programs[-1].role == "tester" and programs[-1].ended["exit"] == tester.EXIT_GONE
                last_look = min(last_look, time.monotonic() + GONE_S * gone)

    def _end(self, program: Program) -> None:
        try:
            if not program.ended:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(program.pidfd, signal.SIGKILL)
                self._reap(program, killed=True)
        finally:
            os.close(program.pidfd)
            os.close(program.report_fd)

    def _reap(self, program: Program, *, killed: bool = False) -> None:
        """Collects an ended child; its pid namespace is empty when this returns.

        Raises OSError for a child that ended by itself before it was confined.
        """
        _, status, used = os.wait4(program.pid, 0)
        signalled = os.WIFSIGNALED(status)
        program.ended = {
            "cpu_s": used.ru_utime + used.ru_stime,
            "exit": None if signalled else os.waitstatus_to_exitcode(status),
            "signal": os.WTERMSIG(status) if signalled else None,
            "killed": killed,
        }
        report = os.read(program.report_fd, 1000)
        if report != CONFINED and not killed:
            raise OSError(f"a child could not be confined: {report.decode(errors='replace')}")


def main(control_fd: int, namespaces: bool) -> None:
    """Says hello to the host (or reports the error), then serves until the host is gone."""
    control = socket.socket(fileno=control_fd)
    volunteer_for_oom(namespaces)
    try:
        for name in PRELOADED:
            importlib.import_module(name)
        if namespaces:
            enter_namespaces()
        guardian = Guardian(control, namespaces=namespaces)
        gc.collect()
        gc.disable()
        gc.freeze()  # the children's collectors leave these pages alone, so they stay shared
    except (OSError, KeyError) as error:  # KeyError: a machine without a table of system calls
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"ready": True, "python": platform.python_version()}).encode())
    guardian.serve()


def volunteer_for_oom(namespaces: bool) -> None:
    """If memory runs out, the kernel should kill programs before the trainer. Best effort: some hosts refuse."""
    proc = f"{confine.HOME}/proc" if namespaces else "/proc"
    with contextlib.suppress(OSError), open(f"{proc}/self/oom_score_adj", "w") as file:
        file.write("1000")


def enter_namespaces() -> None:
    """Gives up root if it has it, then creates a user namespace, in which this process may create others.

    Returns in a child that is the first process of its own pid namespace and dies with its parent.
    """
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        linux.set_process_control(linux.PR_SET_DUMPABLE, 1)  # otherwise /proc/self would still be root's
    uid, gid = os.getuid(), os.getgid()
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWPID)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"{confine.HOME}/proc/self/{name}", "w") as file:
            file.write(text)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    linux.set_process_control(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def _address_space(proc: str) -> int:
    """Bytes of address space of this interpreter, with which every child starts."""
    with open(f"{proc}/self/statm") as file:
        return resource.getpagesize() * int(file.read().split()[0])
