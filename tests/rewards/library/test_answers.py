"""Final-answer rewards on responses a policy really writes."""

import json
from pathlib import Path

import pytest

from rlpost.rewards.library.answers import digit_share, exact_answer, gsm8k, last_number

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"


@pytest.mark.parametrize(
    "response, correct, shows_work",
    [
        ("3+5=8 8-2=6#6", 1, 1),
        ("#6", 1, 0),
        ("3+5=8#7", 0, 1),
        ("6", 0, 0),
        ("", 0, 0),
        ("#", 0, 0),
        ("#6#7", 0, 1),
        ("#66", 0, 0),
    ],
)
def test_exact_answer(response, correct, shows_work):
    parts = exact_answer(response, reference="6", prompt="p", finish_reason="stop")
    assert parts == {"reward": correct, "accuracy": correct, "shows_work": shows_work}


@pytest.mark.parametrize(
    "response, accuracy",
    [
        ("so #### 1,234", 1),
        ("#### 1234.0", 1),
        ("1234 or so", 1),
        ("#### 1235", 0),
        ("1234 #### none", 0),
        ("", 0),
        ("#### -1234", 0),
    ],
)
def test_gsm8k(response, accuracy):
    assert gsm8k(response, reference="work\n#### 1,234")["accuracy"] == accuracy


def test_gsm8k_format_is_a_part_of_its_own():
    assert gsm8k("#### 4", reference="#### 5", format_reward=0.1) == {"reward": 0.1, "accuracy": 0.0, "format": 1.0}


def test_a_reference_without_a_number_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="no number in the reference"):
        gsm8k("4", reference="none")


def test_other_rewards():
    assert last_number("1, then 2.50", reference="2.5") == 1.0
    assert digit_share("a1b2") == 0.5 and digit_share("") == 0.0


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K files lie beside the checkout only where they were put")
def test_every_gsm8k_answer_verifies_against_itself():
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1319
    assert all(gsm8k(row["answer"], reference=row["answer"])["accuracy"] == 1.0 for row in rows)
