"""Chains of additions and subtractions whose number of terms has a heavy tail: the demo's task.

Owns the problems (``3+5-2+7?``) and the mixed teacher whose lessons (supervised examples) warm-start the model; the
``exact_answer`` reward scores the responses. Recipes call :func:`problems` and :func:`lessons` by ``_target_``.

A response either shows its work, restating both operands of each step, ``3+5=8 8-2=6 6+7=13#13``, or just guesses,
``#11``. The teacher does each half of the time and its guesses are off by up to 5, so a model trained on its lessons
knows how to work but does so only half of the time. RL discovers that working pays off.

The number of terms is a Pareto variable (exponent 1.5, from 4, redrawn above 20), so response lengths are
heavy-tailed for a genuine reason: some problems really take more steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MIN_TERMS, MAX_TERMS, TAIL_EXPONENT = 4, 20, 1.5
MAX_VALUE = 99  # running totals stay in 0..99, so every number has at most two digits
GUESS_ERROR = 5
EVAL_SEED, TRAIN_SEED, LESSON_SEED = 1_000_003, 2_000_003, 3_000_017


def draw_num_terms(rng: np.random.Generator, min_terms: int = MIN_TERMS, max_terms: int = MAX_TERMS) -> int:
    while True:
        terms = int(min_terms * (1.0 - rng.random()) ** (-1.0 / TAIL_EXPONENT))
        if terms <= max_terms:
            return terms


def draw_chain(rng: np.random.Generator, num_terms: int) -> list[int]:
    """Signed one-digit terms (1..9) whose running totals stay in 0..MAX_VALUE."""
    terms = [int(rng.integers(1, 10))]
    total = terms[0]
    for _ in range(num_terms - 1):
        term = int(rng.integers(1, 10))
        if (rng.random() < 0.5 and total >= term) or total + term > MAX_VALUE:
            term = -term
        terms.append(term)
        total += term
    return terms


def write_question(terms: list[int]) -> str:
    return f"{terms[0]}" + "".join(f"{t:+d}" for t in terms[1:]) + "?"


def write_working(terms: list[int]) -> str:
    """``3+5=8 8-2=6``: each step restates its operands, which makes it easy to imitate."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return " ".join(steps)


def problems(*, count: int, split: str, min_terms: int = MIN_TERMS, max_terms: int = MAX_TERMS) -> list[dict[str, Any]]:
    """``count`` distinct problems with prompt, answer and num_terms. The two splits share none.

    Args:
        count: how many rows.
        split: "train" or "eval" (held out: a train problem that is also an eval problem is skipped).
        min_terms: the minimum of the Pareto variable; the shortest chain.
        max_terms: the longest chain; draws above it are drawn again. The shipped model was trained up to MAX_TERMS.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: got {split!r}; expected 'train' or 'eval'")
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"min_terms, max_terms: got {min_terms}, {max_terms}; expected 2 <= min_terms <= max_terms")
    held_out: set[str] = set()
    if split == "train":
        pool = problems(count=_EVAL_POOL, split="eval", min_terms=min_terms, max_terms=max_terms)
        held_out = {row["prompt"] for row in pool}
    rng = np.random.default_rng(EVAL_SEED if split == "eval" else TRAIN_SEED)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        terms = draw_chain(rng, draw_num_terms(rng, min_terms, max_terms))
        question = write_question(terms)
        if question not in held_out:
            held_out.add(question)
            rows.append({"prompt": question, "answer": str(sum(terms)), "num_terms": len(terms)})
    return rows


_EVAL_POOL = 2000  # the training split avoids this many evaluation problems


def lessons(*, seed: int = LESSON_SEED, working_share: float = 0.5) -> Iterator[dict[str, str]]:
    """The mixed teacher's lessons, endlessly: rows with prompt and response. Held-out problems never occur."""
    held_out = {row["prompt"] for row in problems(count=_EVAL_POOL, split="eval")}
    rng = np.random.default_rng(seed)
    while True:
        terms = draw_chain(rng, draw_num_terms(rng))
        question, answer = write_question(terms), sum(terms)
        if question in held_out:
            continue
        if rng.random() < working_share:
            response = f"{write_working(terms)}#{answer}"
        else:
            response = f"#{max(0, answer + int(rng.integers(-GUESS_ERROR, GUESS_ERROR + 1)))}"
        yield {"prompt": question, "response": response}
