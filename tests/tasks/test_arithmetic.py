"""The arithmetic task: problems are right, splits are disjoint, lengths are heavy-tailed, lessons are mixed."""

import itertools
import re

import numpy as np
import pytest

from rlpost.tasks.arithmetic import MAX_TERMS, MAX_VALUE, MIN_TERMS, lessons, problems


def test_answers_are_right_and_totals_stay_in_range():
    for row in problems(count=500, split="eval"):
        terms = [int(t) for t in re.findall(r"[+-]?\d", row["prompt"])]
        totals = np.cumsum(terms)
        assert row["answer"] == str(totals[-1]) and totals.min() >= 0 and totals.max() <= MAX_VALUE
        assert MIN_TERMS <= len(terms) == row["num_terms"] <= MAX_TERMS


def test_splits_are_disjoint_and_reproducible():
    held_out = {row["prompt"] for row in problems(count=500, split="eval")}
    train = [row["prompt"] for row in problems(count=5000, split="train")]
    assert len(set(train)) == 5000 and not held_out & set(train)
    assert train[:50] == [row["prompt"] for row in problems(count=50, split="train")]
    assert not held_out & {row["prompt"] for row in itertools.islice(lessons(), 5000)}


def test_chains_may_be_longer_and_the_splits_stay_disjoint():
    held_out = problems(count=300, split="eval", min_terms=8, max_terms=24)
    train = problems(count=3000, split="train", min_terms=8, max_terms=24)
    assert {row["num_terms"] for row in held_out} <= set(range(8, 25)) and max(r["num_terms"] for r in held_out) > 20
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}
    with pytest.raises(ValueError, match="min_terms"):
        problems(count=1, split="eval", min_terms=8, max_terms=7)


def test_the_tail_is_heavy():
    terms = np.array([row["num_terms"] for row in problems(count=2000, split="eval")])
    assert np.median(terms) <= 6 and np.percentile(terms, 99) >= 17


def test_lessons_show_working_half_of_the_time_and_working_is_right():
    rows = list(itertools.islice(lessons(), 2000))
    worked = [r for r in rows if "=" in r["response"]]
    assert 0.45 < len(worked) / len(rows) < 0.55
    for row in worked:
        steps, _, answer = row["response"].partition("#")
        for step in steps.split():
            left, _, right = step.partition("=")
            assert eval(left) == int(right)  # noqa: S307 - our own digits
        assert int(answer) == eval(row["prompt"][:-1])  # noqa: S307
    guesses = [int(r["response"][1:]) - eval(r["prompt"][:-1]) for r in rows if "=" not in r["response"]]  # noqa: S307
    assert min(guesses) >= -5 and max(guesses) <= 5 and 0.05 < np.mean(np.array(guesses) == 0) < 0.15
