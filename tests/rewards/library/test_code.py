"""Both code rewards on the real sandbox: HumanEval where it lies beside the checkout, else tasks of our own."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlpost.config import RewardConfig
from rlpost.errors import ConfigError
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.functions import load_functions
from rlpost.rewards.library.code import OUTCOMES, CodeFunctions, CodeStdio
from rlpost.sandbox import wire
from rlpost.tasks.programs import problems

HUMANEVAL = Path(__file__).parents[4] / "shared/data/humaneval/HumanEval.jsonl.gz"
OWN = Path(__file__).parents[2] / "fixtures/humaneval_tiny.jsonl"


def read_tasks(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


TASKS = read_tasks(OWN) + (read_tasks(HUMANEVAL) if HUMANEVAL.exists() else [])


@pytest.fixture(scope="module")
def functions() -> Iterator[CodeFunctions]:
    reward = CodeFunctions(cpu_s=2.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def stdio() -> Iterator[CodeStdio]:
    reward = CodeStdio(cpu_s=0.5, total_cpu_s=2.0, partial_credit=True, float_tolerance=1e-6)
    yield reward
    reward.close()


def judge(reward: Any, response: str, task: dict[str, Any]) -> dict[str, float]:
    columns = {"entry_point": task["entry_point"]}
    return reward(response, prompt=task["prompt"], reference=task["test"], finish_reason="stop", columns=columns)


def kind(parts: dict[str, float]) -> str:
    (name,) = [name for name in OUTCOMES if parts[f"outcome_{name}"]]
    return name


# ---- functions -----------------------------------------------------------------------------------------------------


def test_every_canonical_solution_passes(functions: CodeFunctions) -> None:
    failed = {}
    for task in TASKS:
        for response in (task["canonical_solution"], f"```python\n{task['prompt']}{task['canonical_solution']}```"):
            parts = judge(functions, response, task)
            if parts["reward"] != 1 or parts["accuracy"] != 1:
                failed[task["task_id"]] = kind(parts)
    assert not failed and len(TASKS) in (6, 170)


@pytest.mark.parametrize("response", ["    pass\n", "", "```python\nx = 1\n```", "I cannot."])
def test_empty_and_wrong_programs_fail(functions: CodeFunctions, response: str) -> None:
    passed = [task["task_id"] for task in TASKS if judge(functions, response, task)["reward"] != 0]
    assert not passed


def test_another_tasks_solution_fails(functions: CodeFunctions) -> None:
    passed = []
    for task, other in zip(TASKS, TASKS[1:] + TASKS[:1], strict=True):
        source = f"{other['prompt']}{other['canonical_solution']}\n{task['entry_point']} = {other['entry_point']}\n"
        if judge(functions, f"```python\n{source}```", task)["reward"]:
            passed.append(task["task_id"])
    assert not passed


def test_tasks_of_the_recipe_refuse_the_shortcut(functions: CodeFunctions) -> None:
    for task in problems(count=40, split="eval"):
        shown = task["prompt"].splitlines()[-2].strip()
        assert judge(functions, task["canonical_solution"], task)["reward"] == 1
        assert kind(judge(functions, f" return {shown}", task)) in ("assertion",)


def test_the_rows_shown_in_the_docs_are_rows_that_work(functions: CodeFunctions, stdio: CodeStdio) -> None:
    page = (Path(__file__).parents[3] / "docs/data-and-rewards.md").read_text()
    rows = [
        json.loads(line) for body in re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL) for line in body.splitlines()
    ]
    assert len(rows) == 3
    for factor, reward in ((2, 1.0), (3, 0.0)):
        for row in rows[:2]:
            columns = {key: value for key, value in row.items() if key not in ("prompt", "test")}
            response = f"```python\ndef twice(x):\n    return {factor} * x\n```"
            assert functions(response, prompt=row["prompt"], reference=row["test"], columns=columns)["reward"] == reward
        assert stdio(f"print({factor} * int(input()))", reference=rows[2]["tests"])["reward"] == reward


def test_mbpp_form(functions: CodeFunctions) -> None:
    tests = ["assert area(3, 4) == 12", "assert area(0, 1) == 0"]
    call = dict(prompt="Write a function area.", finish_reason="stop", columns={"test_setup_code": ""})
    assert functions("```python\ndef area(a, b):\n    return a * b\n```", reference=tests, **call)["reward"] == 1
    assert functions("```python\ndef area(a, b):\n    return a + b\n```", reference=tests, **call)["reward"] == 0


def test_partial_credit_is_the_share_of_tests_and_never_accuracy() -> None:
    reward = CodeFunctions(partial_credit=True)
    parts = reward(
        "def f(x): return abs(x)", prompt="", reference=["assert f(1) == 1", "assert f(-1) == -1"], columns={}
    )
    assert (parts["reward"], parts["accuracy"], parts["passed_share"]) == (0.5, 0.0, 0.5)
    reward.close()


def test_broken_tests_are_a_failure_and_not_a_zero(functions: CodeFunctions) -> None:
    task = {"prompt": "def f(): pass\n", "entry_point": "f", "test": "def check(candidate):\n    assert undefined(1)"}
    with pytest.raises(RewardFailure, match="bad_tests: NameError") as caught:
        judge(functions, "def f(): return 1", task)
    assert caught.value.kind == "bad_tests"
    for unusable in ("", None, [], ["assert f()", ""], {"test": "assert f()"}, 5):
        with pytest.raises(RewardFailure, match="bad_reference: got .*; expected test code"):
            judge(functions, "def f(): return 1", {**task, "test": unusable})


CHECK = "def check(candidate):\n    assert candidate(2) == 4"


@pytest.mark.parametrize(
    ("entry_point", "source"),
    [
        ("Solution().f", "class Solution:\n    def f(self, x): return 2 * x"),
        ("Solution.f", "class Solution:\n    def f(self, x): return 2 * x"),
        (" Solution( ) . f() ", "class Solution:\n    def f(self, x): return 2 * x"),
        ("f()", "def f(x): return 2 * x"),
        (" f\n", "def f(x): return 2 * x"),
        ("größe", "def größe(x): return 2 * x"),
        ("Outer().Inner().f", "class Outer:\n    class Inner:\n        def f(self, x): return 2 * x"),
    ],
)
def test_an_entry_point_may_be_written_as_a_call(functions: CodeFunctions, entry_point: str, source: str) -> None:
    task = {"prompt": "", "entry_point": entry_point, "test": CHECK}
    for factor, reward in ((2, 1.0), (3, 0.0)):
        response = f"```python\n{source.replace('2 *', f'{factor} *')}\n```"
        assert judge(functions, response, task)["reward"] == reward


NO_NAMES = ["f(x)", "def f", "Solution(1).f", "f, g", "f;", ".f", "f.", "a b", "2f", "class", "Solution().lambda", "()"]


@pytest.mark.parametrize("entry_point", [*NO_NAMES, 5, 0, False, True, ["f"], [], {}])
def test_an_entry_point_that_is_no_name_is_a_failure_and_not_a_zero(functions: CodeFunctions, entry_point: Any) -> None:
    task = {"prompt": "", "entry_point": entry_point, "test": CHECK}
    for response in ("```python\ndef f(x): return 2 * x\n```", ""):
        with pytest.raises(RewardFailure, match="got .*; expected a function's name, or Class.method") as caught:
            judge(functions, response, task)
        assert caught.value.kind == "bad_entry_point"


@pytest.mark.parametrize("entry_point", [None, "", "  "])
def test_without_an_entry_point_the_tests_name_the_function(functions: CodeFunctions, entry_point: Any) -> None:
    task = {"prompt": "", "entry_point": entry_point, "test": "assert f(2) == 4"}
    assert judge(functions, "def f(x): return 2 * x", task)["reward"] == 1.0


@pytest.mark.parametrize(
    ("setup", "failure"),
    [
        ("import math", None),
        (["import math", "assert math"], None),
        (5, "bad_tests"),
        ([5], "bad_tests"),
        ({"a": 1}, "bad_tests"),
    ],
)
def test_set_up_code_is_text_or_a_list_of_lines(functions: CodeFunctions, setup: Any, failure: str | None) -> None:
    call = dict(prompt="", reference="assert f() == math.pi", columns={"test_setup_code": setup})
    if failure is None:
        assert functions("import math\ndef f(): return math.pi", **call)["reward"] == 1.0
        return
    with pytest.raises(RewardFailure, match=failure):
        functions("import math\ndef f(): return math.pi", **call)


# ---- integers of any length ----------------------------------------------------------------------------------------

LONG = "7" * 5000


def test_functions_may_read_return_and_print_long_integers(functions: CodeFunctions) -> None:
    call = dict(prompt="", columns={})
    for source, test in (
        ("def f(n): return str(10**n)", "assert f(5000) == '1' + '0' * 5000"),
        ("def f(n): return str(10**n)", "assert int(f(5000)) == 10**5000"),
        ("def f(text): return int(text)", f"assert f({LONG!r}) == {LONG}"),
        (f"def f(n): return {LONG} + n", f"assert str(f(0)) == {LONG!r}"),
        ("def f(n): return [10**n, -10**n]", "assert f(5000) == [10**5000, -10**5000]"),
    ):
        assert functions(source, reference=test, **call)["reward"] == 1.0, source
    wrong = functions("def f(n): return 10**n + 1", reference="assert f(5000) == 10**5000, f(5000)", **call)
    assert kind(wrong) == "assertion"


def test_programs_may_print_and_read_long_integers(stdio: CodeStdio) -> None:
    tests = [{"input": f"{LONG}\n", "output": f"{LONG[:-1]}8\n"}]
    for program in ("print(int(input()) + 1)", "import sys\nsys.stdout.write(str(int(sys.stdin.read()) + 1))"):
        assert stdio(program, reference=tests)["reward"] == 1.0
        assert stdio(program.replace("+ 1", "+ 2"), reference=tests)["reward"] == 0.0
    assert stdio(f"print({LONG})", reference=[{"input": "", "output": LONG}])["reward"] == 1.0


def test_the_cpu_limit_still_ends_a_conversion_that_takes_for_ever(stdio: CodeStdio) -> None:
    parts = stdio("print(len(str(10**10**7)))", reference=[{"input": "", "output": "10000001"}])
    assert kind(parts) == "time_limit"


def test_the_tests_do_not_spend_their_time_on_an_integer_that_a_program_wrote_as_digits() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, (20).to_bytes(4, "big") + b"9" * 20)
        assert wire.read_frame(reader, 100) == int("9" * 20)
        os.write(writer, (21).to_bytes(4, "big") + b"9" * 21)
        with pytest.raises(wire.BadValue):
            wire.read_frame(reader, 100)
    finally:
        os.close(reader)
        os.close(writer)


# ---- standard input and output -------------------------------------------------------------------------------------

TESTS = [{"input": f"{n}\n", "output": f"{n * n}\n"} for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("program", "share", "outcome"),
    [
        ("n = int(input())\nprint(n * n)", 1.0, "passed"),
        ("n = int(input())\nprint(float(n * n) + 1e-9)", 1.0, "passed"),
        ("n = int(input())\nprint(n * n if n < 4 else 0)", 0.75, "assertion"),
        ("n = int(input())\nprint(n * n)\nif n == 1: exit(1)", 0.75, "exception"),
        ("n = int(input())\nwhile n == 2: pass\nprint(n * n)", 0.25, "time_limit"),  # the rest is not run
        ("n = int(input())\nx = bytearray(10**11 * (n - 1))\nprint(n * n)", 0.25, "memory"),
        ("while True: print('x' * 99)", 0.0, "output_limit"),
        ("print(", 0.0, "syntax"),
        ("import time\nn = int(input())\nwhile time.process_time() < 0.4: pass\nprint(n * n)", 1.0, "passed"),
    ],
)
def test_programs_are_judged_by_their_output(stdio: CodeStdio, program: str, share: float, outcome: str) -> None:
    parts = stdio(f"Here:\n```python\n{program}\n```", reference=TESTS)
    assert (parts["reward"], parts["passed_share"], kind(parts)) == (share, share, outcome)
    assert parts["accuracy"] == (share == 1.0)


def test_all_tests_together_have_a_limit(stdio: CodeStdio) -> None:
    program = "import time\nn = int(input())\nwhile time.process_time() < 0.45: pass\nprint(n * n)"
    parts = stdio(program, reference=[*TESTS, *TESTS])
    assert kind(parts) == "time_limit" and parts["passed_share"] == 0.5


def test_without_partial_credit_all_must_pass() -> None:
    reward = CodeStdio(max_tests=3)
    parts = reward("n = int(input())\nprint(n * n if n != 2 else 0)", reference=TESTS)
    assert (parts["reward"], parts["accuracy"]) == (0.0, 0.0)
    assert reward("n = int(input())\nprint(n * n if n != 4 else 0)", reference=TESTS)["reward"] == 1.0  # not run
    reward.close()


@pytest.mark.parametrize(
    "reference",
    [
        TESTS,
        json.dumps(TESTS),
        {"inputs": ["1\n", "2\n"], "outputs": ["1\n", "4\n"]},
        json.dumps({"inputs": ["5"], "outputs": ["25"], "more": 1}),
    ],
)
def test_forms_of_tests(stdio: CodeStdio, reference: Any) -> None:
    assert stdio("n = int(input())\nprint(n * n)", reference=reference)["reward"] == 1.0


@pytest.mark.parametrize(
    "reference",
    [
        *("", "no json", [], {}, [{"input": "1"}], [{"input": [1], "output": "1"}], {"inputs": ["1"], "outputs": []}),
        *(None, 5, True, "null", "5", "[" * 5000, f'[{{"input": {LONG}, "output": "1"}}]', ["1", "1"]),
        *({"inputs": "12", "outputs": "14"}, {"inputs": None, "outputs": None}, {"inputs": ["1"], "outputs": [1]}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_tests_of_another_form_are_a_failure(stdio: CodeStdio, reference: Any) -> None:
    for response in ("print(1)", ""):
        with pytest.raises(RewardFailure, match="bad_reference: got .*; expected "):
            stdio(response, reference=reference)


# ---- both ----------------------------------------------------------------------------------------------------------


def test_every_outcome_is_a_part_of_every_verdict(functions: CodeFunctions) -> None:
    right = judge(functions, TASKS[0]["canonical_solution"], TASKS[0])
    wrong = judge(functions, "    pass", TASKS[0])
    assert set(right) == set(wrong) == {"reward", "accuracy", "passed_share", *(f"outcome_{name}" for name in OUTCOMES)}
    assert all(isinstance(value, float) for value in right.values())


def test_they_are_found_by_name_and_their_version_names_their_limits() -> None:
    first = load_functions(RewardConfig(function="code_functions"))[0].target
    other = load_functions(RewardConfig(function="code_functions", args={"cpu_s": 1.0}))[0].target
    third = load_functions(RewardConfig(function="code_stdio", args={"float_tolerance": 1e-6}))[0].target
    assert len({first.version, other.version, third.version}) == 3
    for reward in (first, other, third):
        assert reward.timeout_s > 300
        reward.close()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("code_functions", {"cpu_s": 0}),
        ("code_functions", {"memory_mb": -1}),
        ("code_functions", {"cpu_seconds": 1}),
        ("code_stdio", {"total_cpu_s": 1.0}),
        ("code_stdio", {"float_tolerance": float("nan")}),
        ("code_stdio", {"max_tests": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_functions(RewardConfig(function=name, args=args))
