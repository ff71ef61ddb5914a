"""Rewards that run the policy's program: functions against tests, and programs against their expected output.

Owns what a row must contain and how an outcome becomes a reward; ``rlpost.sandbox`` runs the program and documents what
is safe about that (docs/sandbox.md). Each instance has its own sandbox, started at the first call and ended by
``close`` or with the process. If nothing can be said about a program (the machine is overloaded, the tests do not
load), :class:`RewardFailure` is raised; an incorrect program scores 0.
"""

from __future__ import annotations

import json
import keyword
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rlpost.errors import ConfigError, explain
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.compare_output import same_output
from rlpost.rewards.library.extract_code import extract_function, extract_program, prompt_code
from rlpost.rewards.values import bad_reference, shown
from rlpost.sandbox.box import FunctionTests, NoOutcome, Outcome, Sandbox
from rlpost.sandbox.limits import STALLED_CPU_SHARE, WALL_FACTOR, Limits

# Every outcome is a reward part, so the metrics show its share. `no_code` is ours, the rest are the sandbox's.
OUTCOMES = (
    "passed",
    "assertion",
    "exception",
    "bad_value",
    "syntax",
    "no_code",
    "exited",
    "crashed",
    "time_limit",
    "memory",
    "output_limit",
    "stalled",
)
LIMITED = ("time_limit", "memory", "output_limit", "stalled")  # not run on the remaining tests either


class CodeReward:
    """What both rewards share: limits, a sandbox with its lifetime, and parts."""

    form: str  # the reward's name, with its own version that changes when its results do

    def __init__(
        self,
        *,
        cpu_s: float = 4.0,
        memory_mb: int = 512,
        tmp_mb: int = 16,
        output_mb: int = 4,
        partial_credit: bool = False,
        allow_unsafe_execution_without_sandbox: bool = False,
    ) -> None:
        """Raises ConfigError for an invalid limit, or if this machine cannot isolate programs."""
        if not 0 < cpu_s < float("inf"):
            raise ConfigError(explain("reward.args.cpu_s", cpu_s, "> 0 seconds", "use 4.0"))
        for name, value, least in (("memory_mb", memory_mb, 16), ("tmp_mb", tmp_mb, 1), ("output_mb", output_mb, 1)):
            if value < least or value != int(value):
                raise ConfigError(explain(f"reward.args.{name}", value, f"a whole number >= {least}", "raise it"))
        self._limits = Limits(
            cpu_s=cpu_s,
            memory_bytes=memory_mb << 20,
            tmp_bytes=tmp_mb << 20,
            output_bytes=output_mb << 20,
        )
        self._partial = partial_credit
        self._sandbox = Sandbox(unsafe=allow_unsafe_execution_without_sandbox)
        with Sandbox(unsafe=allow_unsafe_execution_without_sandbox) as probe:
            probe.start()

    def close(self) -> None:
        self._sandbox.close()

    @property
    def version(self) -> str:
        """Names everything a result depends on besides the row and the response: part of a cache key."""
        return f"{self.form} " + json.dumps(self._settings(), sort_keys=True)

    @property
    def timeout_s(self) -> float:
        """For the caller's own clock: two runs, and as long again for programs that must run alone first, all of them
        stopped by the wall clock."""
        return 4 * self._wall_s() + 300

    def _wall_s(self) -> float:
        return self._limits.wall_s

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self._limits), "partial": self._partial, "python": platform.python_version()}

    def _parts(self, kind: str, passed_share: float) -> dict[str, float]:
        passed = float(kind == "passed")
        return {
            "reward": passed_share if self._partial else passed,
            "accuracy": passed,
            "passed_share": passed_share,
            **{f"outcome_{name}": float(name == kind) for name in OUTCOMES},
        }


class CodeFunctions(CodeReward):
    """``code_functions``: the program's functions pass the row's tests (HumanEval, MBPP).

    The reference is one test source or a list of them: asserts, or a ``check(candidate)``. The columns ``entry_point``
    (the function's name) and ``test_setup_code`` are used if they exist.
    """

    form = "code_functions 2"

    def __call__(
        self, response: str, *, prompt: str, reference: Any, columns: Mapping[str, Any], **_: Any
    ) -> dict[str, float]:
        tests = read_tests(reference)
        entry_point, setup = read_entry_point(columns.get("entry_point")), read_setup(columns.get("test_setup_code"))
        extracted = extract_function(response, prompt=prompt, entry_point=entry_point)
        if extracted is None:
            return self._parts("no_code", 0.0)
        bench = FunctionTests(
            tests=tests,
            entry_points=[entry_point] if entry_point else None,
            helpers=prompt_code(prompt),
            setup=setup,
            partial=self._partial,
        )
        try:
            outcome = self._sandbox.run_functions(extracted.source, bench, self._limits, prelude=extracted.prelude)
        except NoOutcome as failure:
            raise RewardFailure(failure.kind, failure.detail) from None
        share = 1.0 if outcome.kind == "passed" else outcome.num_passed / max(1, outcome.num_tests)
        return self._parts(outcome.kind, share)


class CodeStdio(CodeReward):
    """``code_stdio``: the program prints what every test expects (programming contests).

    The reference is a list of ``{"input": text, "output": text}``, or ``{"inputs": [...], "outputs": [...]}``, or one
    of these as JSON text. Each test is a separate run with its own limits; without partial credit, the first failed
    test is the last one run. All tests of a program together may use ``total_cpu_s``.
    """

    form = "code_stdio 2"

    def __init__(
        self,
        *,
        cpu_s: float = 4.0,
        total_cpu_s: float = 30.0,
        memory_mb: int = 512,
        tmp_mb: int = 16,
        output_mb: int = 4,
        max_tests: int | None = None,
        float_tolerance: float | None = None,
        partial_credit: bool = False,
        allow_unsafe_execution_without_sandbox: bool = False,
    ) -> None:
        """Raises like :class:`CodeReward`."""
        super().__init__(
            cpu_s=cpu_s,
            memory_mb=memory_mb,
            tmp_mb=tmp_mb,
            output_mb=output_mb,
            partial_credit=partial_credit,
            allow_unsafe_execution_without_sandbox=allow_unsafe_execution_without_sandbox,
        )
        if float_tolerance is not None and not 0 < float_tolerance < float("inf"):
            raise ConfigError(explain("reward.args.float_tolerance", float_tolerance, "> 0", "leave it unset"))
        if total_cpu_s < self._limits.cpu_s:
            expected = f">= cpu_s = {self._limits.cpu_s:g}"
            raise ConfigError(explain("reward.args.total_cpu_s", total_cpu_s, expected, "raise it"))
        if max_tests is not None and max_tests < 1:
            raise ConfigError(explain("reward.args.max_tests", max_tests, ">= 1", "leave it unset to run all"))
        self._tolerance, self._total_cpu_s, self._max_tests = float_tolerance, total_cpu_s, max_tests

    def _wall_s(self) -> float:
        return WALL_FACTOR * self._total_cpu_s

    def _settings(self) -> dict[str, Any]:
        own = {"tolerance": self._tolerance, "total_cpu_s": self._total_cpu_s, "max_tests": self._max_tests}
        return super()._settings() | own

    def __call__(self, response: str, *, reference: Any, **_: Any) -> dict[str, float]:
        pairs = read_pairs(reference)[: self._max_tests]
        source = extract_program(response)
        if source is None:
            return self._parts("no_code", 0.0)
        num_passed, first_failed, cpu_s, wall_s = 0, None, 0.0, 0.0
        for given, expected in pairs:
            outcome = self._run_one(source, given, expected)
            cpu_s, wall_s = cpu_s + outcome.cpu_s, wall_s + outcome.wall_s
            kind = self._limit_reached(cpu_s, wall_s) or outcome.kind
            num_passed += kind == "passed"
            first_failed = first_failed or (None if kind == "passed" else kind)
            if first_failed and (not self._partial or kind in LIMITED):
                break
        return self._parts(first_failed or "passed", num_passed / len(pairs))

    def _run_one(self, source: str, given: str, expected: str) -> Outcome:
        try:
            outcome = self._sandbox.run_script(source, given.encode("utf-8", "surrogatepass"), self._limits)
        except NoOutcome as failure:
            raise RewardFailure(failure.kind, failure.detail) from None
        if outcome.kind == "passed" and not same_output(outcome.output, expected, float_tolerance=self._tolerance):
            return replace(outcome, kind="assertion")
        return outcome

    def _limit_reached(self, cpu_s: float, wall_s: float) -> str | None:
        """The same rules over all tests of a program: CPU time decides, wall time catches programs that sleep.

        Raises RewardFailure for one that was slow but did work: the machine may have been slow."""
        if cpu_s > self._total_cpu_s:
            return "time_limit"
        if wall_s <= WALL_FACTOR * self._total_cpu_s:
            return None
        if cpu_s < STALLED_CPU_SHARE * self._total_cpu_s:
            return "stalled"
        raise RewardFailure("overload", f"{wall_s:.0f} s for tests that used {cpu_s:.1f} s of CPU time")


def read_tests(reference: Any) -> list[str]:
    """Test sources of a row. Raises RewardFailure ``bad_reference`` for anything other than text or a list of texts."""
    tests = [reference] if isinstance(reference, str) else reference
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
        raise bad_reference(reference, "test code, or a list of it")
    return list(tests)


def read_entry_point(value: Any) -> str | None:
    """The name of the function under test; None where the row names none.

    A class may be written with or without its call: ``Solution().f`` is ``Solution.f``. Raises RewardFailure
    ``bad_entry_point`` for anything that is no name: no program could pass.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        names = [name.strip() for name in re.sub(r"\(\s*\)", "", value).split(".")]
        if all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
            return ".".join(names)
    raise RewardFailure("bad_entry_point", f"got {shown(value)}; expected a function's name, or Class.method")


def read_setup(value: Any) -> str:
    """Code that runs before the tests: text, a list of texts, or nothing. Raises RewardFailure ``bad_tests``."""
    lines = [value] if isinstance(value, str) else value or []
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise RewardFailure("bad_tests", f"test_setup_code: got {shown(value)}; expected code, or a list of it")
    return "\n".join(lines)


def read_pairs(reference: Any) -> list[tuple[str, str]]:
    """(input, expected output) of a row's tests. Raises RewardFailure ``bad_reference`` for any other form."""
    expected = "a list of {input: text, output: text}, or {inputs: [...], outputs: [...]}, or its JSON text"
    try:
        value = json.loads(reference) if isinstance(reference, str) else reference
    except (ValueError, RecursionError):
        raise bad_reference(reference, expected) from None
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= set(value):
        inputs, outputs = value["inputs"], value["outputs"]
        if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
            raise bad_reference(reference, "as many inputs as outputs, in lists")
        value = [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]
    if not isinstance(value, list | tuple) or not value:
        raise bad_reference(reference, expected)
    pairs = [(test.get("input"), test.get("output")) if isinstance(test, Mapping) else (None, None) for test in value]
    if not all(isinstance(given, str) and isinstance(wanted, str) for given, wanted in pairs):
        raise bad_reference(reference, expected)
    return [(str(given), str(wanted)) for given, wanted in pairs]
