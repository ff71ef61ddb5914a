"""Verdicts, limits, lifetime and load of the sandbox, with programs that mean no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlpost.errors import ConfigError
from rlpost.sandbox import bubblewrap
from rlpost.sandbox.box import FunctionTests, NoOutcome, Sandbox
from rlpost.sandbox.limits import Limits
from rlpost.sandbox.locks import Turns

from .conftest import QUICK, descendants, is_alive, processes_of

ROOT = Path(__file__).parents[2]


def check(*asserts: str) -> FunctionTests:
    body = "".join(f"    assert {line}\n" for line in asserts)
    return FunctionTests(tests=[f"def check(candidate):\n{body}"], entry_points=["f"])


DEEP = "def d(n): return n and d(n - 1) + 1"

# ---- scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "stdin", "kind", "output"),
    [
        ("print(int(input()) * 2)", b"21\n", "passed", b"42\n"),
        ("import sys; print(sum(map(int, sys.stdin.read().split())))", b"1 2\n3\n", "passed", b"6\n"),
        ("print(open(0).read(), end='')", "größer\n".encode(), "passed", "größer\n".encode()),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", b"", "passed", b"\xff\xfe"),
        ("print('\\x1b[2J')", b"", "passed", b"\x1b[2J\n"),
        ("import threading; threading.Thread(target=lambda: print('late')).start()", b"", "passed", b"late\n"),
        ("import atexit; atexit.register(print, 'end'); print('begin')", b"", "passed", b"begin\nend\n"),
        ("import atexit; atexit.register(lambda: 1 / 0); print('x')", b"", "passed", b"x\n"),  # as Python: status 0
        ("if __name__ == '__main__': print('main')", b"", "passed", b"main\n"),
        ("print('x'); exit()", b"", "passed", b"x\n"),
        ("print('x'); exit(1)", b"", "exception", b"x\n"),
        ("print('x'); 1 / 0", b"", "exception", b"x\n"),
        ("input()", b"", "exception", b""),
        ("print('\\ud800')", b"", "exception", b""),
        ("print(", b"", "syntax", b""),
        (f"import sys; sys.setrecursionlimit(10**6)\n{DEEP}\nprint(d(50000))", b"", "passed", b"50000\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\nprint(P(1))", b"", "passed", b"P(x=1)\n"),
        ("import asyncio; asyncio.run(asyncio.sleep(0)); print(1)", b"", "passed", b"1\n"),
        ("open('/tmp/a', 'w').write('b'); print(open('/tmp/a').read())", b"", "passed", b"b\n"),
    ],
)  # fmt: skip
def test_a_script_runs_as_python_would_run_it(
    sandbox: Sandbox, source: str, stdin: bytes, kind: str, output: bytes
) -> None:
    outcome = sandbox.run_script(source, stdin, QUICK)
    assert (outcome.kind, outcome.output) == (kind, output)


def test_a_large_input_arrives_whole(sandbox: Sandbox) -> None:
    outcome = sandbox.run_script("import sys; print(len(sys.stdin.buffer.read()))", b"x" * 8_000_000, QUICK)
    assert outcome.output == b"8000000\n"


# ---- functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "asserts"),
    [
        ("def f(*a, **k): return a, k", ["candidate(1, [2.5], x={'y': None}) == ((1, [2.5]), {'x': {'y': None}})"]),
        ("def f(x): return x", [f"candidate({v}) == {v}" for v in ("{1, 2}", "b'\\0'", "(1,)", "1j", "{(1, 2): 3}")]),
        ("def f(x): return x", ["type(candidate(frozenset([1]))) is frozenset", "candidate(2**200) == 2**200"]),
        ("def f(x): return x", ["candidate(float('nan')) != 0", "candidate('\\ud800') == '\\ud800'"]),
        ("def f(n): yield from range(n)", ["list(candidate(3)) == [0, 1, 2]", "candidate(3) != [0, 1, 2]"]),
        ("import enum\nclass C(enum.IntEnum): A = 3\ndef f(): return C.A", ["candidate() == 3"]),
        ("import collections as c\nP = c.namedtuple('P', 'x y')\ndef f(): return P(1, 2)", ["candidate() == (1, 2)"]),
        ("n = 0\ndef f():\n global n; n += 1; return n", ["[candidate(), candidate()] == [1, 2]"]),
        ("class f:\n def g(self): return 1\n def __new__(c, x): return x", ["candidate(7) == 7"]),
    ],
)  # fmt: skip
def test_values_go_to_and_fro(sandbox: Sandbox, source: str, asserts: list[str]) -> None:
    outcome = sandbox.run_functions(source, check(*asserts), QUICK)
    assert outcome.kind == "passed", outcome


def test_arguments_go_by_value(sandbox: Sandbox) -> None:
    """A program that empties the test's own list would otherwise pass ``candidate(x) == sorted(x)`` with []."""
    tests = FunctionTests(
        tests=["def check(candidate):\n    x = [2, 1]\n    assert candidate(x) == sorted(x)\n"], entry_points=["f"]
    )
    assert sandbox.run_functions("def f(x): x.clear(); return []", tests, QUICK).kind == "assertion"


def test_exceptions_arrive_by_their_built_in_name(sandbox: Sandbox) -> None:
    source = """
class Odd(KeyError): pass
def f(x):
    if x == 0: raise Odd('zero')
    if x == 1: return b'\\xff'.decode()
    raise Exception
"""
    tries = [
        f"    try: candidate({n}); assert 0\n    except {e}: pass\n" for n, e in ((0, "KeyError"), (1, "ValueError"))
    ]
    tests = FunctionTests(tests=["def check(candidate):\n" + "".join(tries)], entry_points=["f"])
    assert sandbox.run_functions(source, tests, QUICK).kind == "passed"


def test_the_prompts_helpers_serve_the_tests_and_a_program_cannot_replace_them(sandbox: Sandbox) -> None:
    prompt = "def double(x):\n    return 2 * x\n\ndef f(x):\n    '''Doubles.'''\n"
    tests = FunctionTests(
        tests=["def check(candidate):\n    assert candidate(3) == double(3)\n"], entry_points=["f"], helpers=prompt
    )
    assert sandbox.run_functions("def f(x): return double(x)", tests, QUICK, prelude=prompt).kind == "passed"
    forged = "def double(x): return 0\ndef f(x): return 0"
    assert sandbox.run_functions(forged, tests, QUICK, prelude=prompt).kind == "assertion"


def test_tests_without_an_entry_point_find_the_functions_they_call(sandbox: Sandbox) -> None:
    tests = FunctionTests(
        tests=["assert tail([1, 2]) == [2]", "assert sum(tail([1, 2, 3])) == head([5])"],
        entry_points=None,
        setup="def unused(): return 1",
    )
    source = "def tail(x): return x[1:]\ndef head(x): return x[0]"
    assert sandbox.run_functions(source, tests, QUICK).kind == "passed"


def test_a_method_of_a_class_can_be_tested(sandbox: Sandbox) -> None:
    tests = FunctionTests(
        tests=["def check(candidate):\n    assert candidate(2) == 4\n"], entry_points=["Solution.twice"]
    )
    assert sandbox.run_functions("class Solution:\n def twice(self, x): return 2 * x", tests, QUICK).kind == "passed"


@pytest.mark.parametrize(
    ("source", "passed", "total"),
    [
        ("def f(x): return x", 3, 3),
        ("def f(x): return x if x < 3 else 0", 2, 3),
        ("def f(x): return 1 / (x - 1) and x", 2, 3),  # raises in the first call; the others are judged
        ("def f(x): exit()", 0, 0),
    ],
)
def test_partial_credit_counts_asserts(sandbox: Sandbox, source: str, passed: int, total: int) -> None:
    tests = FunctionTests(
        tests=["def check(candidate):\n    for n in (1, 2): assert candidate(n) == n\n    assert candidate(3) == 3\n"],
        entry_points=["f"],
        partial=True,
    )
    outcome = sandbox.run_functions(source, tests, QUICK)
    assert (outcome.num_passed, outcome.num_tests) == (passed, total)
    assert (outcome.kind == "passed") == (passed == 3)


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("def check(candidate):\n    assert candidate(helper(1))", "NameError"),
        ("def check(candidate) assert", "SyntaxError"),
        ("def check(candidate):\n    assert True", "never call"),
        ("def check(candidate):\n    assert candidate(lambda: 1)", "function"),
        ("import numpy\ndef check(candidate):\n    assert candidate(1)", "numpy"),
        ("def check(candidate):\n    assert candidate(1) == undefined", "NameError"),
        ("def check(candidate):\n    assert candidate(1) == 1\n    import numpy", "numpy"),
    ],
)
def test_broken_tests_are_no_verdict_on_the_program(sandbox: Sandbox, tests: str, said: str) -> None:
    with pytest.raises(NoOutcome, match=said) as caught:
        sandbox.run_functions("def f(x): return 1", FunctionTests(tests=[tests], entry_points=["f"]), QUICK)
    assert caught.value.kind == "bad_tests"


@pytest.mark.parametrize("returned", ["1 +", "undefined", "__import__('numpy')", "f(", "0"])
def test_text_that_the_tests_evaluate_cannot_pass_for_broken_tests(sandbox: Sandbox, returned: str) -> None:
    tests = FunctionTests(tests=["def check(candidate):\n    assert eval(candidate(1)) == 1\n"], entry_points=["f"])
    assert sandbox.run_functions(f"def f(x): return {returned!r}", tests, QUICK).kind == "assertion"


def test_a_child_that_cannot_be_confined_is_no_verdict() -> None:
    with Sandbox() as box:
        for limits in (Limits(tmp_bytes=-1), Limits(threads=-7)):  # no file system, no limit that the kernel takes
            with pytest.raises(NoOutcome, match="sandbox_error: .*could not be confined"):
                box.run_script("print(1)", b"", limits)
        assert box.run_script("print(1)", b"", QUICK).kind == "passed"


def test_a_prompt_that_does_not_load_is_no_verdict(sandbox: Sandbox) -> None:
    prompt = "import numpy\ndef f(x):\n    pass\n"
    tests = FunctionTests(tests=["assert f(1) == 2"], entry_points=["f"], helpers=prompt)
    with pytest.raises(NoOutcome, match="bad_tests: ModuleNotFoundError.*numpy"):
        sandbox.run_functions("def f(x): return 2 * x", tests, QUICK, prelude=prompt)
    prose = "Write f, which doubles."
    tests = FunctionTests(tests=["assert f(1) == 2"], entry_points=["f"], helpers=prose)
    assert sandbox.run_functions("def f(x): return 2 * x", tests, QUICK, prelude=prose).kind == "passed"


def test_tests_that_end_their_own_process_are_no_verdict(sandbox: Sandbox) -> None:
    tests = FunctionTests(tests=["import os\ndef check(candidate):\n    os._exit(3)"], entry_points=["f"])
    with pytest.raises(NoOutcome, match="tester_crash: .*status 3"):
        sandbox.run_functions("def f(x): return 1", tests, QUICK)


# ---- time and load -------------------------------------------------------------------------------------------------

BUSY = "import time\nwhile time.process_time() < {}: pass\nprint('done')"


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """Three processes for each core that only compute, each with a session (a scheduler's share) of its own."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    hogs = [subprocess.Popen(command, start_new_session=True) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_a_machine_at_full_load_gives_the_same_verdicts(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=0.4, memory_bytes=64 << 20)
    tests = check("candidate(0.25)", "candidate(0.0)")
    slow = "from time import process_time as t\ndef f(s):\n end = t() + s\n while t() < end: pass\n return True"

    def verdicts() -> list[str]:
        scripts = [sandbox.run_script(BUSY.format(cpu_s), b"", limits) for cpu_s in (0.01, 0.3, 0.6)]
        return [outcome.kind for outcome in (*scripts, sandbox.run_functions(slow, tests, limits))]

    expected = ["passed", "passed", "time_limit", "passed"]
    assert verdicts() == expected
    with busy_machine():
        started = time.monotonic()
        assert verdicts() == expected
        assert time.monotonic() - started > 1.5  # the four use 1.0 s of CPU time: the machine was really busy


class RecordedTurns(Turns):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.taken: list[str] = []

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self.taken.append("together")
        with super().together():
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        self.taken.append("alone")
        with super().alone():
            yield


SHORT = Limits(cpu_s=0.2, memory_bytes=64 << 20)  # the backstop comes after 2 s


def test_a_program_that_sleeps_is_run_once_more_alone_and_stalled(tmp_path: Path) -> None:
    turns = RecordedTurns(tmp_path)
    with Sandbox(turns=turns) as box:
        limits = Limits(cpu_s=0.1, memory_bytes=64 << 20)  # the backstop comes after 1 s
        outcome = box.run_script("import time; time.sleep(1000)", b"", limits)
        assert (outcome.kind, turns.taken) == ("stalled", ["together", "alone"])
        source = "import threading\ndef f(x): threading.Event().wait()"
        outcome = box.run_functions(source, check("candidate(1)"), limits)
        assert (outcome.kind, turns.taken[2:]) == ("stalled", ["together", "alone"])


def test_a_program_that_was_slow_for_another_reason_is_no_verdict(sandbox: Sandbox) -> None:
    source = "from time import *\nwhile True:\n sleep(0.05)\n end = monotonic() + 0.003\n while monotonic() < end: pass"
    with pytest.raises(NoOutcome, match="overload: 2 s were not enough for 0.2 s"):
        sandbox.run_script(source, b"", SHORT)


def test_a_program_that_sleeps_less_than_the_backstop_passes(sandbox: Sandbox) -> None:
    assert sandbox.run_script("import time; time.sleep(0.7); print(1)", b"", SHORT).kind == "passed"


# ---- lifetime ------------------------------------------------------------------------------------------------------


def test_nothing_starts_before_the_first_program_and_nothing_stays_after_close() -> None:
    box = Sandbox()
    assert box._guardian is None
    assert box.run_script("print(1)", b"", QUICK).kind == "passed"
    below = processes_of(box) | {box._guardian.pid}
    box.close()
    assert wait_until(lambda: not any(map(is_alive, below)))
    assert box.run_script("print(1)", b"", QUICK).kind == "passed"  # usable again
    box.close()


def test_a_guardian_that_is_killed_is_one_failure_and_the_next_program_gets_a_new_one() -> None:
    with Sandbox() as box:
        box.start()
        result: list[object] = []

        def work() -> None:
            try:
                result.append(box.run_script("import time; time.sleep(60)", b"", QUICK))
            except NoOutcome as error:
                result.append(error.kind)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.3)
        os.kill(sorted(processes_of(box))[1], signal.SIGKILL)  # started second: the guardian
        thread.join(20)
        assert result == ["sandbox_error"]
        assert box.run_script("print(1)", b"", QUICK).kind == "passed"


@pytest.mark.parametrize("socket_held_open", [False, True])
def test_a_sandbox_dies_with_its_owner(socket_held_open: bool) -> None:
    """SIGKILL of the process that uses it, in the middle of a program; with and without a forked process that still
    holds the owner's end of the socket."""
    program = "import time; time.sleep(600)"
    hold = (
        "if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(60); os._exit(0)"
        if socket_held_open
        else "print(0, flush=True)"
    )
    code = f"""
import os, time
from rlpost.sandbox.box import *
box = Sandbox()
box.start()
{hold}
box.run_script({program!r}, b'', Limits(cpu_s=60))
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    try:
        holder = int(owner.stdout.readline())
        assert wait_until(lambda: len(descendants(owner.pid) - {holder}) >= 5), descendants(owner.pid)
        below = descendants(owner.pid) - {holder}
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert wait_until(lambda: not any(map(is_alive, below)))
    if holder:
        assert is_alive(holder)
        os.kill(holder, signal.SIGKILL)


def test_a_forked_process_gets_a_sandbox_of_its_own() -> None:
    with Sandbox() as box:
        box.start()
        guardian = box._guardian
        pid = os.fork()
        if pid == 0:
            kind = box.run_script("print(1)", b"", QUICK).kind
            os._exit(0 if kind == "passed" and box._guardian is not guardian else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert box.run_script("print(1)", b"", QUICK).kind == "passed" and box._guardian is guardian


def test_a_program_that_the_machine_kills_is_no_verdict() -> None:
    with Sandbox() as box:
        box.start()
        at_rest = processes_of(box)
        threading.Timer(0.4, lambda: [os.kill(pid, signal.SIGKILL) for pid in processes_of(box) - at_rest]).start()
        with pytest.raises(NoOutcome, match="killed: the machine"):
            box.run_script("import time; time.sleep(60)", b"", QUICK)


def test_two_sandboxes_work_at_the_same_time(tmp_path: Path) -> None:
    boxes = [Sandbox(turns=Turns(tmp_path)) for _ in range(2)]
    kinds: list[str] = []
    source, patient = "import time; time.sleep(4)", replace(QUICK, cpu_s=3.0)
    threads = [
        threading.Thread(target=lambda b=b: kinds.append(b.run_script(source, b"", patient).kind)) for b in boxes
    ]
    for box in boxes:
        box.start()
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == ["passed", "passed"] and time.monotonic() - started < 7.5, "one after the other they take 8 s"
    for box in boxes:
        box.close()


def wait_until(true: object, timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if true():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


# ---- where there is no sandbox -------------------------------------------------------------------------------------


def test_without_bubblewrap_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt install bubblewrap.*allow_unsafe_execution_without_sandbox"):
        Sandbox().run_script("print(1)", b"", QUICK)


def test_without_user_namespaces_it_refuses() -> None:
    """A user namespace that may have no further ones: what a hardened host looks like from inside."""
    code = """
from rlpost.errors import ConfigError
from rlpost.sandbox.box import Sandbox
try: Sandbox().start()
except ConfigError as error: print("refused:", error)
"""
    inside = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{code}'"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: sandbox: got ") and "user namespaces" in done.stdout


def test_the_unsafe_option_runs_on_the_bare_host_with_limits() -> None:
    with Sandbox(unsafe=True) as box:
        assert box.run_script("import os; print(os.path.exists('/etc/passwd'))", b"", QUICK).output == b"True\n"
        assert box.run_functions("def f(x): return x", check("candidate(1) == 1"), QUICK).kind == "passed"
        assert box.run_script("while True: pass", b"", QUICK).kind == "time_limit"
        assert box.run_script("x = bytearray(10**11)", b"", QUICK).kind == "memory"
        assert box.run_script("import os; os.fork()", b"", QUICK).kind == "exception"
