r"""The math reward against answers whose truth is known: datasets' own golds, and pairs that are hard to tell apart.

Each pair names its source: (identity) a textbook identity, (MATH) a form that golds or answers of the MATH dataset
take (arXiv 2103.03874), (math-verify) a case of its documentation, (GSM8K), (CMATH) their golds, (ours) a trap found
while this was written.
"""

import json
from pathlib import Path

import pytest

from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.math_answers import find_answer, find_boxed, is_equal, math_answer

DATA = Path(__file__).parents[4] / "shared/data"
FIXTURES = Path(__file__).parents[2] / "fixtures"

EQUAL = [
    ("1/2", "0.5", "identity"),
    (r"\frac{1}{2}", "0.5", "math-verify"),
    (r"\frac13", "0.333333", "math-verify"),  # to six decimals where the reference is no decimal number
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", "identity"),
    (r"2\sqrt{3}", r"\sqrt{12}", "identity"),
    (r"11\sqrt2", r"11\sqrt{2}", "MATH"),
    (r"\sin^2 x+\cos^2 x", "1", "identity"),
    (r"\log_2 8", "3", "identity"),
    (r"\binom{5}{2}", "10", "identity"),
    ("5!", "120", "identity"),
    ("2^{10}", "1024", "identity"),
    ("10^{-3}", "0.001", "identity"),
    ("1.5e3", "1500", "ours"),  # LaTeX reads 1.5 times Euler's number times 3
    ("x^2+2x+1", "(x+1)^2", "identity"),
    ("xy", "yx", "identity"),
    ("2+3i", "3i+2", "identity"),
    (r"3\frac12", "3.5", "MATH"),
    (r"\dfrac{3}{4}", "0.75", "MATH"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}", "MATH"),
    ("1,234", "1234", "GSM8K"),
    ("1{,}234", "1234", "MATH"),
    (r"10\,000", "10000", "MATH"),
    (r"\$5", "5", "MATH"),
    ("$18$", "18", "MATH"),
    ("18", "18.", "GSM8K"),
    ("18", "18.00", "GSM8K"),
    ("18", "18 apples", "GSM8K"),
    (r"5 \text{ cm}", "5", "MATH"),
    (r"16\pi", r"16\pi \text{ square units}", "MATH"),
    (r"90^\circ", "90", "MATH"),
    (r"50\%", "0.5", "math-verify"),
    (r"50\%", "50", "math-verify"),
    ("50", r"50\%", "MATH"),
    ("5%", "0.05", "CMATH"),
    (r"\frac{1}{4}", r"25\%", "identity"),
    (r"12.5\%", r"\frac{1}{8}", "identity"),
    ("6/9", "2/3", "CMATH"),
    (r"\{1,2\}", r"\{2,1\}", "identity"),
    ("1,2", "2,1", "MATH"),
    (r"\{1,2\}", "1, 2", "MATH"),
    ("(1,2]", r"(1, 2]", "math-verify"),
    (r"(-\infty,3)", "x<3", "identity"),
    ("x<3", r"(-\infty,3)", "math-verify"),
    ("1 < x < 2", "(1,2)", "math-verify"),
    (r"[0,1]\cup[2,3]", r"[2,3]\cup[0,1]", "identity"),
    ("x=3", "3", "math-verify"),
    ("3", "x=3", "math-verify"),
    ("y=2x+1", "2x-y+1=0", "identity"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "MATH"),
    (r"\text{Monday}", "Monday", "MATH"),
    (r"\text{(B)}", "B", "MATH"),
    ("A", "a", "math-verify"),
    ("no solution", r"\text{No solution}", "MATH"),
    ("2 2/3", "2+2/3", "identity"),
    ("-2 2/3", r"-\frac{8}{3}", "identity"),
    ("2 2/3", r"2\;2/3", "identity"),
    ("x = 2 2/3", "8/3", "identity"),
    ("(2 1/2, 3)", "(2.5, 3)", "identity"),
    ("2 1/2 cm", "2.5", "identity"),
    ("2 2/3", "2.666667", "identity"),
    (r"\frac{5}{2}", "2½", "identity"),
    (r"\frac{8}{3}", "2⅔", "identity"),
    (r"-\frac{1}{2}", "−½", "identity"),
    ("x^{-1}", "x⁻¹", "identity"),
    ("x^2+1", "x²+1", "identity"),
    ("x_1", "x₁", "identity"),
    (r"\sqrt[3]{2}", "∛2", "identity"),
    (r"\sqrt{x+1}", "√(x+1)", "identity"),
    (r"2\sqrt{3}", "2√3", "identity"),
    (r"\sqrt{17}", "sqrt(17)", "identity"),
    (r"\sqrt{17}", "sqrt17", "identity"),
    (r"2\pi", "2pi", "identity"),
    (r"\frac{3\pi}{4}", "3π/4", "identity"),
    (r"\infty", "infinity", "identity"),
    (r"(-\infty,3)", "(-∞, 3)", "identity"),
    (r"90^\circ", "90°", "identity"),
    ("6", "2·3", "identity"),
    (r"A \cup B", "A ∪ B", "identity"),
    ("-5", "\N{EN DASH}5", "ours"),
    ("x-5", "x−5", "identity"),
    ("1 234 567.5", "1234567.5", "identity"),
    ("12345", "12\N{NARROW NO-BREAK SPACE}345", "identity"),
    ("12345", "12~345", "identity"),
    ("100000", "1,00,000", "identity"),
    ("0.123456", r"0.123\,456", "identity"),
    ("12", "１２", "identity"),
    (r"35\%", "35％", "identity"),
    (r"35\%", r"\text{35 percent}", "identity"),
    ("50 per cent", "0.5", "identity"),
    ("0.5", "50 percentage", "identity"),
    (r"17\%", r"\text{17%}", "identity"),
    ("17", r"\text{17}\text{ apples}", "MATH"),
    ("17", r"\mathrm{17\ cm}", "MATH"),
    (r"\text{17 apples}", "17", "MATH"),
    ("1e-07", "0.0000001", "identity"),
    ("x=1e-7", "0.0000001", "identity"),
    (r"1.5 \times 10^{-7}", "1.5e-7", "identity"),
    (r"6.02 \times 10^{23}", "6.02e23", "identity"),
    ("1024", "2**10", "identity"),
    ("1024", "2^10", "ours"),
    ("11:30 am", r"\text{11:30 a.m.}", "ours"),
    (r"\frac{1}{50!}", r"\frac{1}{50\cdot 49!}", "identity"),
    (r"\frac{1}{3000000}", "0.000000333333", "ours"),
    (r"\frac{1}{2^{100}}", "7.888609052210118e-31", "ours"),
    (r"\frac{1}{3000000}", "0.000000333", "ours"),
    (r"\frac{1}{8100}", "0.000123", "ours"),
    (r"\frac{1}{30}", "0.033333", "ours"),
    (r"\{10^{-9}, 1\}", "1, 10^{-9}", "identity"),
    ("0", r"\sin(\pi)", "identity"),
    ("0", r"\sin^2(1)+\cos^2(1)-1", "identity"),
    ("0", r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", "identity"),
    ("0", r"\sqrt{2}\sqrt{2}-2", "identity"),
]
DIFFERENT = [
    ("7", "-7", "GSM8K"),
    ("12", "21", "GSM8K"),
    ("2,3", "2.3", "ours"),
    ("5%", "500%", "ours"),  # 500 % is 5, and 5 is what 5 % is where percent is understood
    ("500%", "5%", "ours"),
    (r"\frac{1}{2}\%", r"50\%", "ours"),
    (r"\frac13", "0.33", "math-verify"),
    (r"\pi", "3.14", "math-verify"),
    (r"\pi", "3.14159", "ours"),
    ("0.0000001", "0.0000002", "ours"),  # six decimals are the same
    ("100000000000000000001", "100000000000000000000", "ours"),  # the same as doubles
    ("(1,2)", "[1,2]", "identity"),
    ("(1,2)", "(2,1)", "identity"),
    (r"\{1,2\}", r"\{1,2,3\}", "identity"),
    (r"\frac{a}{b}", r"\frac{b}{a}", "identity"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "identity"),
    ("x=1", "y=1", "math-verify"),
    ("west", "stew", "ours"),  # as products of letters they are equal
    ("cat", "act", "ours"),
    (r"\text{(B)}", "C", "MATH"),
    ("six", "6", "ours"),
    ("5", "", "ours"),
    ("5", "1/0", "ours"),
    ("5", "5" * 2000, "ours"),
    ("5", "(" * 300 + "5", "ours"),
    ("10^{-20}", "10^{-21}", "ours"),
    ("e^{-50}", "e^{-51}", "ours"),
    ("2^{-1074}", "2^{-1075}", "ours"),
    (r"\frac{1}{10000!}", r"\frac{1}{10001!}", "ours"),
    (r"\frac{1}{3000000}", "0.0000003", "ours"),
    (r"\frac{1}{3000000}", "0.00000033", "ours"),
    ("0", r"\frac{1}{50!}", "ours"),
    ("0", "10^{-200}", "ours"),
    (r"\frac{1}{3000000}", "0", "ours"),
    (r"\sqrt{2}", r"\sqrt{2}+10^{-20}", "ours"),
    (r"\{\frac{1}{50!},2\}", r"\{\frac{1}{52!},2\}", "ours"),
    (r"[0,\frac{1}{50!}]", r"[0,\frac{1}{52!}]", "ours"),
    (r"x=\frac{1}{50!}", r"\frac{1}{52!}", "ours"),
    (r"x<10^{-9}", r"x<10^{-10}", "ours"),
    (r"\begin{pmatrix}10^{-9}&2\end{pmatrix}", r"\begin{pmatrix}10^{-10}&2\end{pmatrix}", "ours"),
    ("(1e-7,2)", "(2e-7,2)", "ours"),
    ("1e-07", "1", "ours"),
    (r"10^{-9}\%", r"10^{-10}\%", "ours"),
    ("2 4/3", r"\frac{10}{3}", "ours"),  # no mixed number
    ("3, 5, 7", "3 5 7", "ours"),
    ("11:30 am", "11:30 pm", "ours"),
    (r"\text{11:30 am}", r"\text{11:30 pm}", "ours"),
    (r"35\%", "35 percentage points", "ours"),
    (r"\text{May 5}", "5", "ours"),
    ("17", r"\text{17 apples and 3 pears}", "ours"),
]
PAIRS = [json.loads(line) for line in (FIXTURES / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
MISSED = [  # equal, and not found to be: a right answer gets 0
    (r"e^{i\pi}", "-1", "identity"),  # i is a symbol here
]


@pytest.mark.parametrize(("gold", "given"), [pair[:2] for pair in EQUAL])
def test_equal_answers_are_found_equal(gold, given):
    assert is_equal(gold, given)


@pytest.mark.parametrize(("gold", "given"), [pair[:2] for pair in DIFFERENT])
def test_different_answers_are_told_apart(gold, given):
    assert not is_equal(gold, given)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['gold']}|{pair['response_answer']}")
def test_pairs_that_other_checkers_got_wrong(pair):
    assert math_answer(rf"\boxed{{{pair['response_answer']}}}", reference=pair["gold"])["accuracy"] == pair["equal"]


@pytest.mark.parametrize(("gold", "given"), [pair[:2] for pair in MISSED])
def test_what_is_known_to_be_missed(gold, given):
    """When this fails, something got better: move the pair up."""
    assert not is_equal(gold, given)


# ---- where the answer stands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5} and \boxed{6", "5"),  # cut at the limit: the last whole one
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{}", ""),
        ("boxed{5}", None),
        (r"\boxed{5", None),
    ],
)
def test_the_last_whole_box_with_balanced_braces(text, content):
    assert find_boxed(text) == content


def test_a_pattern_goes_before_a_box_and_a_box_before_the_marker():
    text = "Answer: 3\n#### 1\n" + r"\boxed{2}"
    assert find_answer(text) == "2"
    assert find_answer(text, r"(?i)answer:\s*(.+)") == "3"
    assert find_answer(text, r"nothing like it (.+)") == "2"
    assert find_answer("work\n#### 1,234\nand more") == "1,234"
    assert find_answer("it is 5") is None


def test_of_several_boxes_only_the_last_counts():
    response = r"\boxed{1} and \boxed{2}"
    for reference, accuracy in (("2", 1.0), ("1", 0.0), ("1, 2", 0.0), (["1", "2"], 1.0)):
        assert math_answer(response, reference=reference)["accuracy"] == accuracy
    assert math_answer(r"\boxed{1, 2}", reference="1, 2")["accuracy"] == 1.0
    assert math_answer("2", reference=r"\boxed{2}")["format"] == 0.0
    assert math_answer(r"\boxed{2}", reference=response)["accuracy"] == 1.0, "of a reference, too"


def test_the_format_is_a_part_of_its_own():
    assert math_answer("it is 5", reference="5", format_reward=0.1) == {"reward": 0.0, "accuracy": 0.0, "format": 0.0}
    assert math_answer("#### 4", reference="5", format_reward=0.1) == {"reward": 0.1, "accuracy": 0.0, "format": 1.0}
    right = math_answer(r"\boxed{10/2}", reference="work\n#### 5", format_reward=0.1)
    assert right == {"reward": 1.1, "accuracy": 1.0, "format": 1.0}


def test_a_reference_may_be_a_number_a_text_or_a_worked_solution():
    for reference in (5, "5", "2+3=5\n#### 5", r"thus $\boxed{5}$"):
        assert math_answer(r"\boxed{5.0}", reference=reference)["accuracy"] == 1.0


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["", "####", "x" * 5000, r"\boxed{}", r"\text{}", "$$", "%", ["5", r"\boxed{ }"]])
def test_a_reference_without_an_answer_is_a_failure_not_a_zero(reference):
    for response in (r"\boxed{5}", "no answer", rf"\boxed{{{reference}}}"):
        with pytest.raises(RewardFailure) as caught:
            math_answer(response, reference=reference)
        assert caught.value.kind == "bad_reference"


def test_a_comparison_that_cannot_be_made_is_a_failure_not_a_zero():
    with pytest.raises(RewardFailure) as caught:
        math_answer(r"\boxed{\frac{2}{0}}", reference=r"\frac{1}{0}")
    assert caught.value.kind == "verify_error"


# ---- datasets ------------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def different(answers):
    """One whole answer for each final one: thousands of rows have a few hundred."""
    return list({find_answer(answer) or answer: answer for answer in answers}.values())


@pytest.mark.parametrize(
    ("path", "count"),
    [
        (DATA / "gsm8k/train.jsonl", 7473),
        (DATA / "gsm8k/test.jsonl", 1319),
        (DATA / "cmath/test.jsonl", 600),
        (FIXTURES / "gsm8k_tiny.jsonl", None),
        (FIXTURES / "cmath_tiny.jsonl", None),
    ],
    ids=lambda value: f"{value.parent.name}/{value.name}" if isinstance(value, Path) else "",
)
def test_every_gold_answer_verifies_against_itself_and_not_against_another(path, count):
    if DATA in path.parents and not path.exists():
        pytest.skip("lies beside the checkout only where it was put")
    answers = read(path)
    assert count in (None, len(answers)) and answers
    for answer in different(answers):
        final = find_answer(answer) or answer
        assert math_answer(rf"\boxed{{{final}}}", reference=answer)["accuracy"] == 1.0, final
        assert math_answer(f"#### {final}", reference=answer)["accuracy"] == 1.0, final
        assert math_answer(rf"\boxed{{{final}+1}}", reference=answer)["accuracy"] == 0.0, final
