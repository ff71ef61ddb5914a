"""Runs a program that reads standard input and writes standard output. Inside the sandbox; standard library."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading

from rlpost.sandbox import candidate, wire

SOURCE = 3
# A program may itself exit with these; they only name its failure.
EXIT_RAISED, EXIT_MEMORY, EXIT_SYNTAX = 1, 120, 121


def run() -> None:
    """Runs the program as ``__main__`` and ends the process with its exit status. Payload: source."""
    source = json.loads(wire.read_whole(SOURCE))["source"]
    os.close(SOURCE)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        status = _run_to_the_end(source)
        sys.stdout.flush()
    except MemoryError:
        status = EXIT_MEMORY
    except BaseException:  # standard output is full, closed, or replaced by the program
        status = EXIT_RAISED
    os._exit(status)


def _run_to_the_end(source: str) -> int:
    status = 0
    try:
        candidate.load("", source, "__main__")
    except SystemExit as error:
        status = _exit_status(error.code)
    except MemoryError:
        status = EXIT_MEMORY
    except candidate.NoSource:
        status = EXIT_SYNTAX
    except BaseException:  # the program may raise anything
        status = EXIT_RAISED
    threading._shutdown()  # type: ignore[attr-defined]  # as at any interpreter's end: wait for the program's threads
    atexit._run_exitfuncs()
    return status


def _exit_status(code: object) -> int:
    """As in the interpreter: None is 0, a number is itself, a text is 1."""
    return 0 if code is None else code & 0xFF if isinstance(code, int) else EXIT_RAISED
