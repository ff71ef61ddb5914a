"""From a model's response to the source that is run. Text in, text out: hostile code is never parsed on the host.

Three forms are recognized, in this order: a fenced block (what chat models write), a whole program, and the
continuation of a prompt that is code (what base models write).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A fence opens at the end of a line, followed by the language or nothing, and closes on a line of its own; the last one
# may be cut off by the length limit.
_OPENING = r"^(?:[^\n`]*```|[ \t]*~~~)[ \t]*([\w+-]*)[^\n`]*\n"
_FENCE = re.compile(_OPENING + r"(.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py", "py3")
# What may start in the first column and still belong to the continuation of a function.
_CONTINUES = re.compile(r"(?:\s|def |async def |class |@|import |from |#|[)\]}]|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """``prelude`` is the prompt's code, which runs first unless the response repeats it."""

    source: str
    prelude: str = ""


def extract_program(response: str) -> str | None:
    """The last fenced Python block, or the whole response if it has no fence; None if there is nothing to run.

    ``reward.text`` decides whether thoughts are part of the response.
    """
    blocks = _python_blocks(response)
    if blocks:
        return blocks[-1]
    return response if response.strip() and not _FENCE.search(response) else None


def extract_function(response: str, *, prompt: str, entry_point: str | None) -> Extracted | None:
    """The program with the function that the tests call.

    Of several fenced blocks, the last one that defines ``entry_point`` counts (or the last one, if none does: a usage
    example often follows the solution). Without a fence, a response that defines it is a program, and any other
    continues the prompt's code.
    """
    code = prompt_code(prompt)
    defines = _definition_of(entry_point)
    blocks = _python_blocks(response)
    if blocks:
        defining = [block for block in blocks if defines.search(block)]
        return Extracted(source=(defining or blocks)[-1], prelude=code)
    if not response.strip():
        return None
    if defines.search(response):
        return Extracted(source=response, prelude=code)
    return Extracted(source=prompt + cut_continuation(response) if code == prompt else response, prelude="")


def prompt_code(prompt: str) -> str:
    """The code in a prompt: its last fenced block if it has one, else all of it (prose is detected in the sandbox)."""
    blocks = _python_blocks(prompt)
    return blocks[-1] if blocks else prompt


def cut_continuation(text: str) -> str:
    """Up to the first line that no longer belongs to the function: a call, a print, prose in the first column."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if number and not _CONTINUES.match(line):
            return "".join(lines[:number])
    return text


def _python_blocks(text: str) -> list[str]:
    return [body for language, body in _FENCE.findall(text) if language.lower() in PYTHON]


def _definition_of(name: str | None) -> re.Pattern[str]:
    first = re.escape((name or "").split(".")[0]) if name else r"\w+"
    return re.compile(rf"^(?:async\s+def|def|class)\s+{first}\b|^{first}[ \t]*(?::[^=\n]+)?=", re.MULTILINE)
