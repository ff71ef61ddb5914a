"""What is run of an answer."""

import time

import pytest

from rlpost.rewards.library.extract_code import cut_continuation, extract_function, extract_program

PROMPT = 'def f(x):\n    """ Doubles. """\n'
FULL = "def f(x):\n    return 2 * x\n"


def fence(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}```\n"


@pytest.mark.parametrize(
    ("response", "source"),
    [
        (f"Here it is:\n{fence(FULL)}Good luck!", FULL),
        (fence(FULL, "") + "done", FULL),
        (fence(FULL, "Python3"), FULL),
        (fence("g = 1\n") + "Better:\n" + fence(FULL), FULL),  # the last one that defines it
        (fence(FULL) + "Use it so:\n" + fence("print(f(2))\n"), FULL),
        (fence(FULL) + "Output:\n" + fence("4\n", "text"), FULL),
        (f"```python\n{FULL}", FULL),  # cut off by the limit
        (f"~~~python\n{FULL}~~~", FULL),
        ("import math\n\n" + FULL, "import math\n\n" + FULL),  # a program without a fence
        ("    return 2 * x\n", PROMPT + "    return 2 * x\n"),  # a continuation
        ("    return 2 * x\n\n\nprint(f(3))\n", PROMPT + "    return 2 * x\n\n\n"),
        ("f = lambda x: 2 * x", "f = lambda x: 2 * x"),
        ("class f:\n    pass\n", "class f:\n    pass\n"),
    ],
)
def test_a_function_is_found(response: str, source: str) -> None:
    extracted = extract_function(response, prompt=PROMPT, entry_point="f")
    assert extracted is not None and extracted.source == source
    assert extracted.prelude == ("" if source.startswith(PROMPT) else PROMPT)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_there_may_be_nothing_to_run(response: str) -> None:
    assert extract_function(response, prompt=PROMPT, entry_point="f") is None
    assert extract_program(response) is None


def test_the_prompts_code_may_stand_in_a_fence() -> None:
    prompt = f"Complete this function.\n{fence(PROMPT)}"
    extracted = extract_function(fence("def f(x): return g(x)\n"), prompt=prompt, entry_point="f")
    assert extracted is not None and extracted.prelude == PROMPT
    prose = extract_function(FULL, prompt="Write f, which doubles.", entry_point=None)
    assert prose is not None and prose.source == FULL


@pytest.mark.parametrize(
    ("response", "source"),
    [
        ("First " + fence("a = 1\n") + "then\n" + fence("print(1)\n"), "print(1)\n"),
        ("print(1)", "print(1)"),
        ("Text\n```cpp\nint main() {}\n```", None),
        (fence("x\n", "cpp") + fence("print(2)\n"), "print(2)\n"),
    ],
)  # fmt: skip
def test_a_program_is_the_last_block(response: str, source: str | None) -> None:
    assert extract_program(response) == source


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    a\n    b\n", "    a\n    b\n"),
        ("    a\n\ndef g():\n    b\n", "    a\n\ndef g():\n    b\n"),
        ("    a\nassert f(1)\n", "    a\n"),
        ("    a\nThis works because\n", "    a\n"),
        ("    a\nif __name__ == '__main__':\n    b\n", "    a\n"),
        (" a", " a"),
    ],
)
def test_a_continuation_ends_with_the_function(text: str, kept: str) -> None:
    assert cut_continuation(text) == kept


@pytest.mark.parametrize("piece", ["```", "```\n", " " * 100, "\n", "x = 1\n", "def f", "~~~python\n"])
def test_extraction_takes_linear_time(piece: str) -> None:
    started = time.process_time()
    extract_function(piece * (2_000_000 // len(piece)), prompt=PROMPT, entry_point="f")
    assert time.process_time() - started < 5
