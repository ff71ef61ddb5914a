"""Final-answer rewards on responses a policy really writes."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.answers import digit_share, exact_answer, gsm8k, last_number
from rlpost.rewards.library.read_numbers import first_number
from rlpost.rewards.library.read_numbers import last_number as find_last

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"
CASES = Path(__file__).parents[4] / "shared/cases"
FIXTURES = Path(__file__).parents[2] / "fixtures"


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
    with pytest.raises(RewardFailure, match="bad_reference: got 'none'; expected a number in it"):
        gsm8k("4", reference="none")


FORMS = [json.loads(line) for line in (FIXTURES / "number_forms.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['response']}|{form['reference']}")
def test_numbers_as_people_write_them(form):
    assert gsm8k(form["response"], reference=form["reference"])["accuracy"] == form["accuracy"]
    assert last_number(form["response"], reference=form["reference"]) == form["accuracy"]
    worked = f"work\n#### {form['reference']}"
    assert gsm8k(f"work\n{form['response']}", reference=worked)["accuracy"] == form["accuracy"]


@pytest.mark.skipif(not CASES.exists(), reason="lies beside the checkout only where it was put")
def test_the_fixture_is_the_file_of_cases():
    for name in ("number_forms.jsonl", "math_pairs.jsonl"):
        assert (FIXTURES / name).read_bytes() == (CASES / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "value", "percent"),
    [
        ("1e-7", Fraction(1, 10**7), False),
        ("1E+6", 10**6, False),
        ("1.5e\N{MINUS SIGN}3", Fraction(3, 2000), False),
        (r"6 \times 10^{23}", 6 * 10**23, False),
        ("6.5×10^2", 650, False),
        ("\N{MINUS SIGN}5", -5, False),
        ("+5", 5, False),
        (".5", Fraction(1, 2), False),
        ("-.5", Fraction(-1, 2), False),
        ("1/2", Fraction(1, 2), False),
        ("1 / 2", Fraction(1, 2), False),
        ("1\N{FRACTION SLASH}2", Fraction(1, 2), False),
        (r"-\frac{1}{2}", Fraction(-1, 2), False),
        (r"3\dfrac{1}{2}", Fraction(7, 2), False),
        ("-3 1/2", Fraction(-7, 2), False),
        ("3 5/2", 3, False),  # no mixed number: two numbers
        ("1,234,567.5", Fraction(2469135, 2), False),
        ("1,00,000", 100000, False),
        ("12\N{NARROW NO-BREAK SPACE}345", 12345, False),
        ("1,2", 1, False),  # a list
        ("1234,567", 1234, False),
        ("50%", 50, True),
        (r"50\%", 50, True),
        ("50 percent", 50, True),
        ("50 per cent", 50, True),
        ("50 percentage points", 50, False),
        ("5 perches", 5, False),
        ("42.", 42, False),
        ("5e", 5, False),
        ("1" * 5000, int("1" * 4000) * 10**1000 + int("1" * 1000), False),
        ("1e5000", None, False),
        ("1e99999999999", None, False),
        ("1" * 100_000, None, False),
        ("1/0", None, False),
        (r"\frac{x}{2}", 2, False),
        ("none", None, False),
        ("", None, False),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_the_first_number_of_a_text(text, value, percent):
    found = first_number(text)
    assert (found.value, found.percent) == (value, percent) if value is not None else found is None


def test_the_last_number_of_a_text():
    for text, value in {
        "10/2 = 5": 5,
        "on 1/2/2020": 2020,
        "a half is 1/2.": Fraction(1, 2),
        "3 apples, 1/2 pear": Fraction(1, 2),
        "1 2 3": 3,
        "1e5000 and 7": 7,
        "7, 1/0": 7,
    }.items():
        assert find_last(text).value == value, text


@pytest.mark.parametrize(
    ("gold", "given", "same"),
    [("50%", "0.5", 1), ("50%", "50", 1), ("0.5", "50%", 1), ("50", "50%", 1), ("5%", "500%", 0), ("5%", "500", 0)],
)
def test_percentages(gold, given, same):
    assert last_number(given, reference=gold) == same == gsm8k(f"#### {given}", reference=gold)["accuracy"]


PIECES = ["1", "1 ", "1,", "1/", "-", "1e", ".", "1" * 50 + " ", "1 1/1", r"\frac{1}", "1,111", "%", "1  "]


@pytest.mark.parametrize("piece", PIECES)
def test_reading_numbers_takes_linear_time(piece):
    started = time.monotonic()
    last_number(piece * (400_000 // len(piece)), reference="5")
    assert time.monotonic() - started < 10


def test_other_rewards():
    assert last_number("1, then 2.50", reference="2.5") == 1.0
    assert digit_share("a1b2") == 0.5 and digit_share("") == 0.0


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K files lie beside the checkout only where they were put")
def test_every_gsm8k_answer_verifies_against_itself():
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1319
    assert all(gsm8k(row["answer"], reference=row["answer"])["accuracy"] == 1.0 for row in rows)
