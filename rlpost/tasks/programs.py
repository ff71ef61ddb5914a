"""One-function programming tasks in HumanEval's form, small enough for a tiny character model.

Owns the tasks (a signature, a docstring that names the steps and shows one example, hidden tests) and the mixed teacher
whose lessons (supervised examples) warm-start the model; the ``code_functions`` reward scores the responses. Recipes
call :func:`problems` and :func:`lessons` by ``_target_``.

A task is a pipeline on a number or on a list::

    def f(x):                        def f(v):
     \"\"\"add 3, times 2, cap 20         \"\"\"keep odd, times 3, sum
     >>> f(4)                         >>> f([1,2,5])
     14                               18
     \"\"\"                              \"\"\"

A response either writes out the steps (`` x=x+3``, `` x=x*2``, `` return min(x,20)``) or hard-codes what the example
shows (`` return 14``). The teacher does each half of the time, so a model trained on its lessons knows how to program
but does so only half of the time. The hidden tests use other inputs, and RL discovers that programming pays off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n\"'()[]:,.+-*/%=<>_"
MIN_STEPS, MAX_STEPS = 2, 4
NUM_TESTS = 5
EVAL_SEED, TRAIN_SEED, LESSON_SEED = 4_000_037, 5_000_011, 6_000_011
_EVAL_POOL = 2000  # training tasks and lessons avoid the pipelines of this many evaluation tasks

# words -> (expression in x or v with {a} for the digit, the same as a function of value and digit)
Step = tuple[str, Callable[[Any, int], Any]]
ON_NUMBER: dict[str, Step] = {
    "add {a}": ("x+{a}", lambda x, a: x + a),
    "minus {a}": ("x-{a}", lambda x, a: x - a),
    "times {a}": ("x*{a}", lambda x, a: x * a),
    "mod {a}": ("x%{a}", lambda x, a: x % a),
    "from {a}": ("{a}-x", lambda x, a: a - x),
    "cap {a}": ("min(x,{a})", lambda x, a: min(x, a)),
    "floor {a}": ("max(x,{a})", lambda x, a: max(x, a)),
    "square": ("x*x", lambda x, a: x * x),
    "half": ("x//2", lambda x, a: x // 2),
    "negate": ("-x", lambda x, a: -x),
    "size": ("abs(x)", lambda x, a: abs(x)),
}
ON_LIST: dict[str, Step] = {
    "add {a}": ("[i+{a} for i in v]", lambda v, a: [i + a for i in v]),
    "times {a}": ("[i*{a} for i in v]", lambda v, a: [i * a for i in v]),
    "keep odd": ("[i for i in v if i%2==1]", lambda v, a: [i for i in v if i % 2 == 1]),
    "keep even": ("[i for i in v if i%2==0]", lambda v, a: [i for i in v if i % 2 == 0]),
    "above {a}": ("[i for i in v if i>{a}]", lambda v, a: [i for i in v if i > a]),
    "below {a}": ("[i for i in v if i<{a}]", lambda v, a: [i for i in v if i < a]),
    "reverse": ("v[::-1]", lambda v, a: v[::-1]),
    "sort": ("sorted(v)", lambda v, a: sorted(v)),
    "skip {a}": ("v[{a}:]", lambda v, a: v[a:]),
}
LIST_ENDS: dict[str, Step] = {
    "sum": ("sum(v)", lambda v, a: sum(v)),
    "count": ("len(v)", lambda v, a: len(v)),
    "last": ("v[-1:]", lambda v, a: v[-1:]),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """``words`` and ``expressions`` have one entry per step; ``cases`` are (input, output), the example first."""

    name: str  # of the argument: x for a number, v for a list
    words: tuple[str, ...]
    expressions: tuple[str, ...]
    cases: tuple[tuple[Any, Any], ...]

    @property
    def prompt(self) -> str:
        given, wanted = self.cases[0]
        docstring = f'"""{", ".join(self.words)}\n >>> f({show(given)})\n {show(wanted)}\n """'
        return f"def f({self.name}):\n {docstring}\n"

    @property
    def solution(self) -> str:
        """The steps written out, one per line."""
        *steps, last = self.expressions
        return "".join(f" {self.name}={step}\n" for step in steps) + f" return {last}"

    @property
    def shortcut(self) -> str:
        """The example's output, regardless of the input."""
        return f" return {show(self.cases[0][1])}"

    @property
    def test(self) -> str:
        asserts = (f"    assert candidate({show(given)}) == {show(wanted)}\n" for given, wanted in self.cases[1:])
        return "def check(candidate):\n" + "".join(asserts)


def show(value: Any) -> str:
    return repr(value).replace(" ", "")


def draw_task(rng: np.random.Generator) -> Task:
    """A random pipeline whose hidden tests reject the shortcut."""
    while True:
        on_list = rng.random() < 0.5
        steps = _draw_steps(rng, on_list)
        cases = tuple((given, _apply(steps, given)) for given in _draw_inputs(rng, on_list))
        outputs = [wanted for _, wanted in cases]
        if sum(wanted == outputs[0] for wanted in outputs[1:]) <= 1 and all(len(show(o)) <= 16 for o in outputs):
            return Task(
                name="v" if on_list else "x",
                words=tuple(words.format(a=a) for words, _, a in steps),
                expressions=tuple(step[0].format(a=a) for _, step, a in steps),
                cases=cases,
            )


def _draw_steps(rng: np.random.Generator, on_list: bool) -> list[tuple[str, Step, int]]:
    table = ON_LIST if on_list else ON_NUMBER
    steps = []
    for _ in range(int(rng.integers(MIN_STEPS, MAX_STEPS + 1)) - on_list):
        words = str(rng.choice(list(table)))
        digit = int(rng.integers(1, 3) if words == "skip {a}" else rng.integers(2, 10))
        steps.append((words, table[words], digit))
    if on_list:
        words = str(rng.choice(list(LIST_ENDS)))
        steps.append((words, LIST_ENDS[words], 0))
    return steps


def _draw_inputs(rng: np.random.Generator, on_list: bool) -> list[Any]:
    """The example's input and those of the tests, all different."""
    inputs: list[Any] = []
    while len(inputs) < NUM_TESTS + 1:
        values = [int(n) for n in rng.integers(0, 13, size=int(rng.integers(3, 6)))] if on_list else []
        drawn = values if on_list else int(rng.integers(-9, 21))
        if drawn not in inputs:
            inputs.append(drawn)
    return inputs


def _apply(steps: list[tuple[str, Step, int]], value: Any) -> Any:
    for _, (_, function), digit in steps:
        value = function(value, digit)
    return value


def problems(*, count: int, split: str) -> list[dict[str, Any]]:
    """``count`` tasks with different pipelines, in HumanEval's columns. The two splits share no pipeline.

    Args:
        count: how many rows.
        split: "train" or "eval" (held out: a pipeline that is also an evaluation task's is skipped).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: got {split!r}; expected 'train' or 'eval'")
    seen = set() if split == "eval" else _held_out()
    rng = np.random.default_rng(EVAL_SEED if split == "eval" else TRAIN_SEED)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        task = draw_task(rng)
        if task.words not in seen:
            seen.add(task.words)
            rows.append(
                {
                    "task_id": f"programs/{split}/{len(rows)}",
                    "prompt": task.prompt,
                    "entry_point": "f",
                    "canonical_solution": task.solution,
                    "test": task.test,
                }
            )
    return rows


def _held_out() -> set[tuple[str, ...]]:
    rng = np.random.default_rng(EVAL_SEED)
    pipelines: set[tuple[str, ...]] = set()
    while len(pipelines) < _EVAL_POOL:
        pipelines.add(draw_task(rng).words)
    return pipelines


def lessons(*, seed: int = LESSON_SEED, solution_share: float = 0.5) -> Iterator[dict[str, str]]:
    """The mixed teacher's lessons, endlessly: rows with prompt and response. Held-out pipelines never occur."""
    held_out = _held_out()
    rng = np.random.default_rng(seed)
    while True:
        task = draw_task(rng)
        if task.words not in held_out:
            yield {"prompt": task.prompt, "response": task.solution if rng.random() < solution_share else task.shortcut}
