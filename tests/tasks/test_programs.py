"""The small programming tasks and their mixed teacher."""

from itertools import islice

import pytest

from rlpost.tasks.programs import CHARACTERS, lessons, problems


def run_tests(task: dict[str, str], body: str) -> bool:
    names: dict[str, object] = {}
    exec(task["prompt"] + body, names)  # our own text
    exec(task["test"], names)
    try:
        names["check"](names["f"])  # type: ignore[operator]
    except AssertionError:
        return False
    return True


def test_solutions_pass_and_shortcuts_do_not() -> None:
    for task in problems(count=300, split="train"):
        assert run_tests(task, task["canonical_solution"])
        shown = task["prompt"].splitlines()[-2].strip()
        assert not run_tests(task, f" return {shown}")


def test_the_example_is_right() -> None:
    for task in problems(count=100, split="eval"):
        names: dict[str, object] = {}
        exec(task["prompt"] + task["canonical_solution"], names)
        call, shown = task["prompt"].splitlines()[-3:-1]
        assert repr(eval(call.strip().removeprefix(">>> "), names)).replace(" ", "") == shown.strip()


def words_of(prompt: str) -> str:
    return prompt.split('"""')[1].splitlines()[0]


def test_held_out_pipelines_occur_in_no_training_task_and_no_lesson() -> None:
    held_out = {words_of(task["prompt"]) for task in problems(count=300, split="eval")}
    assert len(held_out) == 300
    assert not held_out & {words_of(task["prompt"]) for task in problems(count=2000, split="train")}
    assert not held_out & {words_of(lesson["prompt"]) for lesson in islice(lessons(), 2000)}


def test_the_teacher_hard_codes_its_share() -> None:
    drawn = list(islice(lessons(solution_share=0.5), 1000))
    shortcuts = sum(lesson["response"] == f" return {lesson['prompt'].splitlines()[-2].strip()}" for lesson in drawn)
    assert 430 < shortcuts < 570
    assert set("".join(lesson["prompt"] + lesson["response"] for lesson in drawn)) <= set(CHARACTERS)


def test_tasks_are_the_same_every_time() -> None:
    assert problems(count=5, split="train") == problems(count=9, split="train")[:5]
    with pytest.raises(ValueError, match="split"):
        problems(count=1, split="test")
