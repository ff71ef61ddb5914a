"""Other programs and fresh interpreters, each with a time limit: what is broken ends there and becomes a finding.

A *probe* is a module of this folder that runs in an interpreter of its own. It reports through :class:`Reports`: a line
of JSON when something begins and one when it is done, so that a crash in the middle still tells where it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.errors import UserError

# The alarm ends a probe whose doctor was killed: nobody else would.
PROGRAM = (
    "import signal, sys; signal.alarm({limit}); sys.path[:] = {path!r}; from {module} import main; main({arguments!r})"
)
ORPHAN_S = 10
CAUSES = ("Error", "Exception", "Interrupt", "error:")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """``failure``: why it did not end well, in one line; empty if it did."""

    out: str
    failure: str


def run_program(command: Sequence[str], limit_s: float) -> Ended:
    """Runs it in a session of its own and kills the session at the limit; never raises for what the program does."""
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Ended(out="", failure=f"{command[0]}: {error.strerror}")
    with _lock:
        _running.add(process)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Ended(out=out, failure=f"not done within {limit_s:g} s")
    finally:
        with _lock:
            _running.discard(process)
    if process.returncode == 0:
        return Ended(out=out, failure="")
    end = f"exit status {process.returncode}" if process.returncode > 0 else signal.Signals(-process.returncode).name
    return Ended(out=out, failure=": ".join(filter(None, [end, last_error(err or out)])))


_lock = threading.Lock()
_running: set[subprocess.Popen[str]] = set()


@contextlib.contextmanager
def programs_killed() -> Iterator[None]:
    """Meanwhile, whatever :func:`run_program` waits for in any thread is killed, also what it only now starts: Ctrl-C
    does not reach another session."""
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.05):
            with _lock:
                for process in _running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    try:
        yield
    finally:
        done.set()
        killing.join()


def last_error(text: str) -> str:
    """The last line of an error: of a traceback the one that names the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if any(word in line.partition(" ")[0] for word in CAUSES)]
    return (named or lines or [""])[-1]


# ---- probes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What a probe reported: ``results`` by name; ``failures`` by name, the last one where it crashed or hung."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def run_probe(module: str, arguments: Sequence[str], limit_s: float) -> Probed:
    """Runs ``main(arguments)`` of ``module`` in a fresh interpreter that finds what this one finds."""
    alarm = math.ceil(limit_s) + ORPHAN_S
    program = PROGRAM.format(limit=alarm, path=sys.path, module=module, arguments=list(arguments))
    ended = run_program([sys.executable, "-c", program], limit_s)
    return read_reports(ended)


def read_reports(ended: Ended) -> Probed:
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    begun = "start"
    for line in ended.out.splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue  # the last line, cut off
        begun = report["name"]
        if "error" in report:
            failures[begun] = report["error"]
        elif "result" in report:
            results[begun] = report["result"]
    if ended.failure and begun not in failures:
        failures[begun] = ended.failure
    return Probed(results=results, failures=failures)


class Reports:
    """The probe's side. Takes standard output for itself; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def attempt(self, name: str, work: Callable[[], dict[str, Any] | None]) -> bool:
        """Does ``work`` and reports its result or its error; whether it worked."""
        self._write({"name": name})
        try:
            result = work() or {}
        except UserError as error:
            self._write({"name": name, "error": str(error)})
            return False
        except Exception as error:
            self._write({"name": name, "error": f"{type(error).__name__}: {error}".strip().splitlines()[0]})
            return False
        self._write({"name": name, "result": result})
        return True

    def _write(self, report: dict[str, Any]) -> None:
        print(json.dumps(report), file=self._out, flush=True)

    def end(self) -> None:
        """Ends the process here: how libraries shut down says nothing about the machine."""
        self._out.flush()
        os._exit(0)
