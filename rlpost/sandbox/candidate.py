"""Runs the policy's functions for a tester: arguments come in, values go out. Inside the sandbox; standard library.

Everything here lives in the same process as the hostile program, which may rewrite any of it. That gains it nothing:
the process holds no expected value, and anything it writes is read as a value that it returned.
"""

from __future__ import annotations

import builtins
import json
import os
import site
import sys
import types
from typing import Any

from rlpost.sandbox import wire

CALLS, RESULTS = 3, 4  # descriptors: calls come from the tester, results go to it
SOURCE = 5
MAX_TEXT = 500  # of an exception's message


class NoSource(SyntaxError):
    """The program does not compile."""


def run() -> None:
    """Loads the program and handles calls until the tester is gone. Payload: prelude, source, max_bytes."""
    payload = json.loads(wire.read_whole(SOURCE))
    os.close(SOURCE)
    max_bytes = payload["max_bytes"]
    try:
        names = load(payload["prelude"], payload["source"], "program")
        reply: dict[str, Any] = {"ready": True}
    except BaseException as error:  # the program may raise anything; the tester decides what it means
        names, reply = {}, describe(error)
    wire.write_frame(RESULTS, reply, max_bytes)
    while True:
        try:
            call = wire.read_frame(CALLS, wire.CALL_ROOM * max_bytes)
        except EOFError:
            os._exit(0)
        try:
            reply = {"value": handle_call(call, names)}
        except BaseException as error:
            reply = describe(error)
        try:
            wire.write_frame(RESULTS, reply, max_bytes)
        except wire.BadValue as error:
            wire.write_frame(RESULTS, describe(error), max_bytes)


def load(prelude: str, source: str, module_name: str) -> dict[str, Any]:
    """Runs ``source`` as a module, after ``prelude`` (the prompt, if it is code); returns the module's names.

    Raises NoSource, and whatever the program raises.
    """
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module
    site.setquit()  # exit() and quit(), which the interpreter lacks without its site packages
    prompt_code = compile_prompt(prelude)
    if prompt_code is not None:
        exec(prompt_code, module.__dict__)
    try:
        code = compile(source, "program.py", "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: zero bytes, lone surrogates
        raise NoSource(str(error)) from None
    exec(code, module.__dict__)
    return module.__dict__


def compile_prompt(prompt: str) -> types.CodeType | None:
    """None for a prompt in prose."""
    try:
        return compile(prompt, "prompt.py", "exec")
    except (SyntaxError, ValueError):
        return None


def handle_call(call: dict[str, Any], names: dict[str, Any]) -> Any:
    function = find(call["name"], names)
    arguments = wire.decode(call["args"])
    keywords = {key: wire.decode(value) for key, value in call["kwargs"].items()}
    return wire.encode(function(*arguments, **keywords), exact=False)


def find(name: str, names: dict[str, Any]) -> Any:
    """A function of the program; ``Solution.solve`` is a method of a new instance."""
    first, *rest = name.split(".")
    if first not in names:
        raise NameError(f"name {first!r} is not defined")
    found = names[first]
    for part in rest:
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def describe(error: BaseException) -> dict[str, Any]:
    """The exception, under the name of the first built-in class in its MRO."""
    if isinstance(error, wire.BadValue):
        return {"bad_value": str(error)[:MAX_TEXT]}
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:  # the program's own __str__
        text = ""
    return {"raised": name, "text": text, "no_source": isinstance(error, NoSource)}
