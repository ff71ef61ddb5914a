"""Every value that a user gives a reward, or a reward gives back, has one meaning or is a failure with a name."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpost.config import RewardConfig, SourceConfig
from rlpost.errors import ConfigError, DataError
from rlpost.rewards.functions import LoadedFunction, Question, Response, load_functions
from rlpost.rewards.library import answers, math_answers
from rlpost.rewards.outcomes import to_outcome, to_outcomes
from rlpost.rewards.scoring import RewardScorer, make_decode
from rlpost.rewards.selection import FunctionSpec, list_functions
from rlpost.rewards.values import answer_text, read_golds, read_outcome
from rlpost.rewards.worker_pool import InlineCalls
from rlpost.types import Prompt
from tests.data_rows import read_rows

CASES = Path(__file__).parents[3] / "shared/cases"
REWARDS = ("exact_answer", "gsm8k", "last_number", "math")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
HUGE = 10**5000  # more digits than str() writes


# ---- what a function returns -----------------------------------------------------------------------------------------


def verl_style(response, *, reference, **_):
    right = response.strip() == reference
    return {"score": float(right), "acc": right, "pred": response[:20]}


def test_text_beside_a_score_is_a_failure_and_not_a_number():
    (outcome,) = score(verl_style, "5", reference="5")
    assert outcome.failure.startswith("reward_error: ValueError: the part pred of a reward must be a number, got '5'")


@pytest.mark.parametrize(
    ("returned", "reward", "parts"),
    [
        ({"score": 1.0, "acc": True}, 1.0, {"acc": 1.0}),
        ({"score": 0, "length": -0.5}, 0.0, {"length": -0.5}),
        ({"score": 0.25}, 0.25, {}),
        ({"reward": 1.0, "score": 0.5}, 1.0, {"score": 0.5}),  # then a score is a part like others
        ({"score": 1.0, "reward": 0.5}, 0.5, {"score": 1.0}),
        ({"a": 1, "b": 0.5}, 1.5, {"a": 1.0, "b": 0.5}),
        ({"reward": np.float32(0.5), "a": np.int64(2)}, 0.5, {"a": 2.0}),
        (Fraction(1, 2), 0.5, {}),
        (Decimal("0.5"), 0.5, {}),
        (np.array(0.5), 0.5, {}),
        (True, 1.0, {}),
    ],
)
def test_numbers_and_named_numbers(returned, reward, parts):
    assert read_outcome(returned) == (reward, parts)


@pytest.mark.parametrize(
    "returned",
    [
        "1.0",
        b"1",
        "",
        [],
        [1.0],
        (1.0, 2.0),
        {},
        {"reward": "1.0"},
        {"reward": 1.0, "text": ""},
        {"reward": 1.0, "text": "0.5"},
        {"score": None},
        {"a": None},
        {"a": [1]},
        {"a": {"b": 1}},
        {"reward": 1.0, "a": float("inf")},
        {"a": 1e308, "b": 1e308},
        {1: 0.5},
        {None: 0.5},
        float("nan"),
        HUGE,
        {"a": HUGE},
        np.str_("1.0"),
        np.array("1.0"),
        np.array([1.0]),
        np.complex64(1 + 2j),
        1 + 2j,
        np.datetime64("2020-01-01"),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_a_failure(returned):
    with pytest.raises(ValueError, match="reward"):
        read_outcome(returned)
    assert to_outcome(returned).failure.startswith("reward_error: ValueError")
    assert [o.failure is not None for o in to_outcomes([returned, 1.0], 2)] == [True, False]


class Hostile:
    shape = ()

    def item(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no repr either")


@pytest.mark.parametrize("returned", [Hostile(), [Hostile()], {"a": Hostile()}])
def test_a_value_whose_methods_raise_is_a_failure(returned):
    assert to_outcome(returned).failure.startswith("reward_error")
    assert to_outcomes(returned, 3)[0].failure.startswith("reward_error")
    (outcome,) = score(lambda response: returned, "x")
    assert outcome.failure.startswith("reward_error")


@given(JSON)
@example(HUGE)
@example([HUGE])
@example({"a": HUGE})
@settings(deadline=None, max_examples=300)
def test_whatever_a_function_returns_ends_in_a_number_no_opinion_or_a_named_failure(returned):
    for function, count in (
        (lambda response: returned, 1),
        (lambda responses: returned, 2),
        (lambda responses: [returned, returned], 2),
        (lambda completions: [returned, returned], 2),
    ):
        for outcome in score(function, *["x"] * count):
            if outcome.failure is not None:
                assert outcome.failure.partition(":")[0] == "reward_error" and outcome.reward is None
            elif outcome.reward is not None:
                assert math.isfinite(outcome.reward) and all(map(math.isfinite, outcome.parts.values()))
    (outcome,) = score(lambda response: returned, "x")
    expected = returned is None or is_number(returned) or is_mapping_of_numbers(returned)
    assert (outcome.failure is None) == expected


def is_number(value):
    largest = 2**1024 - 2**970 - 1  # the integers up to it round to a finite float
    return isinstance(value, bool | int) and abs(value) <= largest or isinstance(value, float) and math.isfinite(value)


def is_mapping_of_numbers(value):
    if not isinstance(value, dict) or not value or not all(map(is_number, value.values())):
        return False
    return "reward" in value or "score" in value or math.isfinite(sum(map(float, value.values())))


def test_a_weighted_sum_that_is_not_finite_is_a_failure():
    functions = {"a": {"function": lambda response: 1e300, "weight": 1e300}, "b": {"function": lambda response: 1.0}}
    calls = InlineCalls(load_functions(RewardConfig(function=None, functions=functions, workers=0)))
    scorer = RewardScorer(calls, lambda parts: "x")
    scorer.submit(Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="?"), 0, [np.zeros(1, np.int32)], "stop")
    assert scorer.poll()[0].failure == "reward_error: the weighted sum is inf"


# ---- references ------------------------------------------------------------------------------------------------------

UNUSABLE = [None, "", " \n", [], {}, {"ground_truth": "5"}, True, False, float("nan"), float("inf")]
UNUSABLE += [[None], ["5", None], ["5", ""], ["5", ["6"]], [{}], ["5", True]]


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("reference", UNUSABLE, ids=repr)
@pytest.mark.parametrize("response", ["5", "#5", "#### 5", r"\boxed{5}", r"\boxed{None}", "#None", "#True", "nothing"])
def test_an_unusable_reference_is_a_failure_whatever_the_response(name, reference, response):
    (outcome,) = score(name, response, reference=reference)
    assert outcome.reward is None and outcome.failure.startswith("bad_reference: got ")


@pytest.mark.parametrize(("name", "reference"), [("gsm8k", "none"), ("last_number", "x"), ("gsm8k", ["5", "x"])])
def test_a_reference_without_a_number_is_a_failure_where_numbers_are_compared(name, reference):
    assert score(name, "5", reference=reference)[0].failure.startswith("bad_reference")
    assert score(name, "no number", reference=reference)[0].failure.startswith("bad_reference")


@pytest.mark.parametrize("name", REWARDS)
def test_any_of_several_references_is_correct(name):
    for text, correct in (("#### 2", 1.0), ("#### 2.50", 1.0), ("#### 3", 0.0), ("", 0.0)):
        (outcome,) = score(name, text, reference=["2", "2.50"])
        assert outcome.reward == correct, text


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    ("reference", "texts"),
    [
        (5, "5"),
        (-5, "-5"),
        (18.0, "18"),
        (1e-07, "0.0000001"),
        (6.02e23, "602000000000000000000000"),
        (0.1, "0.1"),
        ([5, 6.5], "6.5"),
    ],
)
def test_a_number_as_reference_is_its_decimal_text(name, reference, texts):
    assert score(name, f"#### {texts}", reference=reference)[0].reward == 1.0
    assert score(name, f"#### {texts}1", reference=reference)[0].reward == 0.0


def test_a_huge_number_as_reference():
    assert len(read_golds(HUGE)[0]) == 5001
    for name in ("exact_answer", "gsm8k", "last_number"):
        assert score(name, "#### 1" + "0" * 5000, reference=HUGE)[0].reward == 1.0
        assert score(name, "#### 1" + "0" * 4999, reference=HUGE)[0].reward == 0.0
    assert score("math", r"\boxed{1}", reference=HUGE)[0].failure.startswith("bad_reference")


@given(JSON)
@settings(deadline=None, max_examples=150)
def test_every_reference_of_a_file_is_a_number_or_a_named_failure(tmp_path_factory, reference):
    """From the line of a file to the outcome, with responses that the text of an unusable reference would match."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "?", "answer": reference}) + "\n", encoding="utf-8")
    try:
        (row,) = read_rows(SourceConfig(path=str(path)))
    except DataError:
        return
    value = row["answer"]
    texts = ["5", f"#### {value!s}"[:500], f"\\boxed{{{json.dumps(value)}}}"[:500]]
    for function in (answers.exact_answer, answers.gsm8k, answers.last_number, quick_math):
        for text in texts:
            (outcome,) = score(function, text, reference=value)
            if outcome.failure is None:
                assert 0.0 <= outcome.reward <= 1.0 and is_usable(value)
            else:
                assert outcome.failure.partition(":")[0] == "bad_reference"
            if not is_usable(value):
                assert outcome.failure is not None


def is_usable(value):
    if isinstance(value, list):
        return bool(value) and all(not isinstance(v, list) and is_usable(v) for v in value)
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def quick_math(response, *, reference):
    """The math reward up to the comparison by math-verify, which may take minutes for odd text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_answers, "verify", lambda gold, given: False)
        patch.setattr(math_answers, "parse", lambda text: (text,))
        return math_answers.math_answer(response, reference=reference)


@pytest.mark.skipif(not CASES.exists(), reason="lies beside the checkout only where it was put")
def test_the_files_of_cases():
    for line in (CASES / "data/answer_null.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in REWARDS:
            (outcome,) = score(name, "#### None", reference=row["answer"])
            assert (outcome.failure is not None) == (row["answer"] is None)
    for line in (CASES / "data/answer_list.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in REWARDS:
            for gold in row["answer"]:
                assert score(name, f"#### {gold}", reference=row["answer"])[0].reward == 1.0


# ---- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "opened", "answer"),
    [
        ("5", False, "5"),
        ("", False, ""),
        ("<think>a</think>5", False, "5"),
        ("<think>a</think>b</think>5", False, "5"),
        ("a</think>5", False, "5"),  # the prompt opened the thought
        ("a</think>5", True, "5"),
        ("<think>5", False, ""),
        ("a <think>5", False, ""),
        ("<think>a</think>5<think>6", False, ""),
        ("5", True, ""),
        ("<think>a</think>5", True, "5"),
        ("<think>a</think>", False, ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(response, opened, answer):
    assert answer_text(response, opens_thought=opened) == answer


FORMS = {"exact_answer": "# {}", "gsm8k": "#### {}", "last_number": "{}", "math": r"\boxed{{{}}}"}


@pytest.mark.parametrize("name", REWARDS)
def test_thoughts_are_no_answers(name):
    right, wrong = (FORMS[name].format(x) for x in (5, 6))
    cases = {
        f"<think>{wrong}</think>{right}": 1.0,
        f"<think>{right}</think>{wrong}": 0.0,
        f"<think>try {right}? no": 0.0,
        f"<think>{right}</think>": 0.0,
        f"{wrong}</think>{right}": 1.0,
        right: 1.0,
    }
    for response, reward in cases.items():
        assert score(name, response, reference="5")[0].reward == reward, response
    assert score("math", r"<think>\boxed{5}</think>The answer is 6.", reference="5")[0].reward == 0.0


def test_a_thought_that_the_prompt_opened():
    assert score("math", r"try \boxed{5}? no", reference="5", opens_thought=True)[0].reward == 0.0
    assert score("math", r"6</think>\boxed{5}", reference="5", opens_thought=True)[0].reward == 1.0


def test_programs_are_read_after_the_thoughts():
    loaded = load_functions(RewardConfig(function="code_stdio", workers=0))[0]
    tests = [{"input": "", "output": "1"}]
    try:
        for response, reward in {
            "<think>\n```python\nprint(2)\n```\n</think>\n```python\nprint(1)\n```": 1.0,
            "<think>\n```python\nprint(1)\n```\n": 0.0,
            "<think>no</think>print(1)": 1.0,
        }.items():
            (outcome,) = loaded.score(Question("", tests, {}), [Response(response, "stop")])
            assert outcome.reward == reward, response
    finally:
        loaded.close()


def test_who_gets_the_whole_text():
    def own(response):
        return float(len(response))

    whole, answer = "<think>a</think>5", "5"
    assert score(own, whole)[0].reward == len(whole), "a reward may be about the thoughts"
    assert score(own, whole, text="answer")[0].reward == len(answer)
    for function in (lambda responses: list(map(len, responses)), lambda completions: list(map(len, completions))):
        assert [o.reward for o in score(function, whole, "", text="answer")] == [1, 0]
        assert [o.reward for o in score(function, whole, "")] == [len(whole), 0]
    assert score("last_number", "<think>7</think>none", reference="7", text="all")[0].reward == 1.0
    assert score(partial(answers.last_number), "<think>7</think>none", reference="7")[0].reward == 1.0


def test_reward_text_is_for_all_functions_and_each_may_say_otherwise():
    form = {"function": "format_match", "text": "all"}
    functions = {"right": {"function": "math"}, "form": form, "own": {"function": len}}

    def texts(text):
        return [one.text for one in list_functions(RewardConfig(function=None, functions=functions, text=text))]

    assert texts("auto") == ["auto", "all", "auto"] and texts("answer") == ["answer", "all", "answer"]
    with pytest.raises(ConfigError, match="reward.functions.form.text.*one of auto, answer, all"):
        form["text"] = "thoughts"
        texts("auto")


def test_another_text_is_another_question_for_the_cache():
    loaded = [LoadedFunction(FunctionSpec(function="math", text=text), RewardConfig()) for text in ("all", "answer")]
    assert loaded[0].facts.version != loaded[1].facts.version


@pytest.mark.parametrize("changed", ["read_numbers.py", "math_text.py", "values.py"])
def test_an_edited_module_is_another_question_for_the_cache(changed, monkeypatch):
    """Of the library for the rewards that ship, of how values are read for all."""

    def own(response):
        return 1.0

    def versions():
        return [LoadedFunction(FunctionSpec(function=f), RewardConfig()).facts.version for f in ("math", own)]

    before, read = versions(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == changed))
    assert [a != b for a, b in zip(before, versions(), strict=True)] == [True, changed == "values.py"]


# ---- special tokens --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """``<think>`` and ``</think>`` are special tokens, as are a chat's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *"0123456789abc #\\{}box"])}
    raw = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="c"))
    raw.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": special[:3]})
    return made


def ids_of(tokenizer, *words):
    return np.array([tokenizer.convert_tokens_to_ids(word) for word in words], np.int32)


def test_special_tokens_reach_the_reward_and_stop_and_padding_tokens_do_not(tokenizer):
    end, pad = ids_of(tokenizer, "<|im_end|>", "<|endoftext|>").tolist()
    decode = make_decode(tokenizer, [end])
    parts = [
        ids_of(tokenizer, "<|endoftext|>", "<think>", "a"),
        ids_of(tokenizer, "</think>", "<|im_start|>", "5", "<|im_end|>", "<|endoftext|>"),
    ]
    assert decode(parts) == "<think>a</think><|im_start|>5"
    assert pad != end and decode([]) == ""


def test_the_format_reward_of_the_docs_sees_the_tags(tokenizer):
    """Both rewards of the page, on tokens: one looks at the tags, the other at what follows them."""
    functions = {
        "right": {"function": "last_number", "weight": 1.0},
        "form": {"function": "format_match", "weight": 0.2, "args": {"pattern": "<think>.*</think>.*"}},
    }
    calls = InlineCalls(load_functions(RewardConfig(function=None, functions=functions, workers=0)))
    scorer = RewardScorer(calls, make_decode(tokenizer, ids_of(tokenizer, "<|im_end|>").tolist()))
    for index, words in enumerate((["<think>", "a", "</think>", "5", "<|im_end|>"], ["5"], ["<think>", "5"])):
        prompt = Prompt(uid="0:0", token_ids=ids_of(tokenizer, "a"), text="?", reference="5")
        scorer.submit(prompt, index, [ids_of(tokenizer, *words)], "stop")
    assert [v.reward for v in scorer.poll()] == pytest.approx([1.2, 1.0, 0.0])


@pytest.mark.parametrize(
    ("tail", "reward"), [(["<think>"], 0.0), (["<think>", " "], 0.0), (["<think>", "</think>"], 1.0), (["a"], 1.0)]
)
def test_a_prompt_whose_template_opens_the_thought(tokenizer, tail, reward):
    """The template's text is in the tokens only; what the model wrote before the limit has no tag."""
    calls = InlineCalls(load_functions(RewardConfig(function="last_number", workers=0)))
    scorer = RewardScorer(calls, make_decode(tokenizer, []))
    prompt = Prompt(uid="0:0", token_ids=ids_of(tokenizer, *["a"] * 50, *tail), text="?", reference="5")
    scorer.submit(prompt, 0, [ids_of(tokenizer, "a", "5")], "length")
    assert scorer.poll()[0].reward == reward


# ---- a function's attributes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("timeout_s", "5", "seconds > 0"),
        ("timeout_s", 0, "seconds > 0"),
        ("timeout_s", None, "seconds > 0"),
        ("timeout_s", True, "seconds > 0"),
        ("concurrency", 2.7, "a whole number >= 1"),
        ("concurrency", "4", "a whole number >= 1"),
        ("concurrency", 0, "a whole number >= 1"),
        ("cacheable", "false", "true or false"),
        ("cacheable", None, "true or false"),
    ],
)
def test_an_attribute_that_cannot_be_meant_is_refused(name, value, expected):
    async def reward(response):
        return 1.0

    setattr(reward, name, value)
    with pytest.raises(ConfigError, match=rf"reward: {name}: got .* expected {expected}"):
        LoadedFunction(FunctionSpec(function=reward), RewardConfig())


# ----------------------------------------------------------------------------------------------------------------------


def score(function, *responses, reference="5", opens_thought=False, text="auto"):
    loaded = LoadedFunction(FunctionSpec(function=function, text=text), RewardConfig(), "answer")
    question = Question(prompt="?", reference=reference, columns={}, opens_thought=opens_thought)
    return loaded.score(question, [Response(response, "stop") for response in responses])
