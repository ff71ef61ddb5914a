"""Runs the tests, with a proxy for the program, which lives elsewhere. Inside its own sandbox; standard library.

The tests, their expected values and the prompt's helper functions exist only here. What they call as ``candidate`` is a
proxy that sends the arguments to the candidate's process and decodes the reply. Arguments are passed by value: a
program cannot change a test's own objects. The outcome is written to a file that the candidate never had access to.

Outcomes: ``passed``; what the program did wrong (``assertion``, ``exception``, ``bad_value``, ``syntax``, ``exited``,
``memory``, ``gone``: its process ended); or what the tests did wrong (``bad_tests``), which says nothing about it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import os
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from rlpost.sandbox import candidate, wire

RESULTS, CALLS = 3, 4  # descriptors: results come from the candidate, calls go to it
SOURCE, OUTCOME = 5, 6
SOURCES = ("prompt.py", "setup", "tests")  # names of the data set's code in tracebacks
EXIT_GONE = 3  # of this process: the candidate's end shows what happened, wait for it


def run() -> None:
    """Payload: helpers, setup, tests (list), entry_points (list or None), partial, max_bytes."""
    payload = json.loads(wire.read_whole(SOURCE))
    os.close(SOURCE)
    bench = Bench(max_bytes=payload["max_bytes"], partial=payload["partial"])
    names = bench.prepare(payload)  # first: a prompt that does not load is not the program's fault
    bench.await_program()
    bench.run_tests(payload, names)
    bench.finish()


class Bench:
    """One program under test: its proxies, and what has happened so far."""

    def __init__(self, *, max_bytes: int, partial: bool) -> None:
        self._max_bytes = max_bytes
        self._partial = partial
        self.num_calls = 0
        self.num_passed = 0
        self.num_failed = 0
        self.num_missed = 0  # asserts that were never reached
        self._failure: tuple[str, str] | None = None  # the first one

    # -- the candidate's side ----------------------------------------------------------------------------------------

    def await_program(self) -> None:
        reply = self._receive()
        if "ready" not in reply:
            self._end_on(reply)

    def call(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """One call of the program. Raises what the program raised, under the name of its built-in class."""
        self.num_calls += 1
        try:
            message = {
                "name": name,
                "args": [wire.encode(value, exact=True) for value in arguments],
                "kwargs": {key: wire.encode(value, exact=True) for key, value in keywords.items()},
            }
            wire.write_frame(CALLS, message, wire.CALL_ROOM * self._max_bytes)
        except wire.BadValue as error:
            self.stop("bad_tests", f"{name} is called with {error}")
        except BrokenPipeError:
            self.stop("gone", "")
        reply = self._receive()
        try:
            if "value" in reply:
                return wire.decode(reply["value"], depth=wire.CALL_DEPTH)
        except (wire.BadValue, RecursionError, MemoryError) as error:
            self.stop("bad_value", str(error))
        if "raised" not in reply:
            self._end_on(reply)
        raise self._exception(reply)

    def _receive(self) -> dict[str, Any]:
        try:
            reply = wire.read_frame(RESULTS, self._max_bytes)
        except (EOFError, OSError):
            self.stop("gone", "")
        except (wire.BadValue, MemoryError) as error:
            self.stop("bad_value", str(error))
        if not isinstance(reply, dict):
            self.stop("bad_value", "not one of our frames")
        return reply

    def _exception(self, reply: dict[str, Any]) -> Exception:
        name, text = str(reply["raised"]), str(reply.get("text", ""))
        if name in ("SystemExit", "MemoryError"):
            self._end_on(reply)
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and similar classes need more arguments
            error = ValueError(text)
        error.from_program = True  # type: ignore[attr-defined]
        return error

    def _end_on(self, reply: dict[str, Any]) -> NoReturn:
        """Ends the tests if the program cannot continue: it does not load, called exit, or is out of memory."""
        if "raised" not in reply:
            self.stop("bad_value", str(reply.get("bad_value", "not one of our frames")))
        name = str(reply["raised"])
        kind = {"SystemExit": "exited", "MemoryError": "memory"}.get(name, "exception")
        kind = "syntax" if reply.get("no_source") else kind
        self.stop(kind, f"{name}: {reply.get('text', '')}")

    # -- the tests' side ---------------------------------------------------------------------------------------------

    def run_tests(self, payload: dict[str, Any], names: dict[str, Any]) -> None:
        try:
            trees = [ast.parse(source, "tests") for source in payload["tests"]]
        except Exception as error:  # text of the data set that is not code
            self.stop("bad_tests", f"{type(error).__name__}: {error}")
        wanted = payload["entry_points"] or find_free_names(trees, names)
        if not wanted:
            self.stop("bad_tests", "no function to test; name it in a column entry_point")
        names.update({name.split(".")[0]: make_proxy(self, name) for name in wanted})
        names["candidate"], names["__check__"] = make_proxy(self, wanted[0]), self._check
        written = sum(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))
        for tree in trees:
            self._check(functools.partial(self._run_one, tree, names), whole=True)
            if self._failure and not self._partial:
                break
        self.num_missed = max(0, (written if self._partial else len(trees)) - self.num_passed - self.num_failed)

    def prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The names the tests may use: the prompt's helpers, if the prompt is code, and the setup."""
        names = types.ModuleType("tests").__dict__
        try:
            prompt_code = candidate.compile_prompt(payload["helpers"])
            if prompt_code is not None:
                exec(prompt_code, names)
            exec(compile(payload["setup"], "setup", "exec"), names)
        except Exception as error:  # code of the data set that does not load
            self.stop("bad_tests", f"{type(error).__name__}: {error}")
        return names

    def _run_one(self, tree: ast.Module, names: dict[str, Any]) -> None:
        names.pop("check", None)
        tree = ast.fix_missing_locations(CountAsserts().visit(tree)) if self._partial else tree
        exec(compile(tree, "tests", "exec"), names)
        if callable(names.get("check")):
            names["check"](names["candidate"])

    def _check(self, test: Callable[[], None], *, whole: bool = False) -> None:
        """Runs one assert (or, without partial credit, all) and counts it."""
        try:
            test()
        except AssertionError as error:
            self._fail("exception" if hasattr(error, "from_program") else "assertion", str(error), whole)
        except BaseException as error:  # anything that a wrong value makes the tests raise
            if self._blames_tests(error):
                self.stop("bad_tests", f"{type(error).__name__}: {error}")
            kind = "exception" if hasattr(error, "from_program") else "assertion"
            self._fail(kind, f"{type(error).__name__}: {error}", whole)
        else:
            self.num_passed += not (whole and self._partial)

    def _blames_tests(self, error: BaseException) -> bool:
        """Whether the tests' own code is broken. Not if they evaluate text that the program returned."""
        if hasattr(error, "from_program") or not isinstance(error, (NameError, ImportError, SyntaxError)):
            return False
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        return not self.num_calls or (innermost in SOURCES and not isinstance(error, SyntaxError))

    def _fail(self, kind: str, text: str, whole: bool) -> None:
        self.num_failed += not (whole and self._partial)
        self._failure = self._failure or (kind, text)

    # -- the outcome -------------------------------------------------------------------------------------------------

    def finish(self) -> NoReturn:
        if self._failure:
            self.stop(*self._failure)
        if not self.num_calls:
            self.stop("bad_tests", "the tests never call the program")
        self.stop("passed", "")

    def stop(self, kind: str, text: str) -> NoReturn:
        """Writes the outcome and ends the process, from any depth: no test can catch this."""
        outcome = {
            "kind": kind,
            "text": text[:500],
            "num_passed": self.num_passed,
            "num_tests": self.num_passed + self.num_failed + self.num_missed,
            "num_calls": self.num_calls,
        }
        os.pwrite(OUTCOME, json.dumps(outcome).encode(), 0)
        os._exit(EXIT_GONE if kind == "gone" else 0)


def make_proxy(bench: Bench, name: str) -> Callable[..., Any]:
    """The program's function as the tests see it."""

    def proxy(*arguments: Any, **keywords: Any) -> Any:
        return bench.call(name, arguments, keywords)

    proxy.__name__ = name.rpartition(".")[2]
    return proxy


class CountAsserts(ast.NodeTransformer):
    """For partial credit: every assert is run and counted separately, and the next one runs in any case."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        template = ast.parse("def __assert__():\n    pass\n__check__(__assert__)").body
        function = template[0]
        assert isinstance(function, ast.FunctionDef)
        function.body = [node]
        return ast.copy_location(ast.If(test=ast.Constant(True), body=template, orelse=[]), node)


def find_free_names(trees: list[ast.Module], known: dict[str, Any]) -> list[str]:
    """Functions that tests call and nobody defines: the program's, if a row does not name them (MBPP)."""
    called: dict[str, None] = {}
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called[node.func.id] = None
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
    return [name for name in called if name not in bound | set(known) and not hasattr(builtins, name)]
