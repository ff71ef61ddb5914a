"""What a row's values become, and what is refused: by kind, and for rows of every form JSON has."""

import datetime
import decimal
import enum
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpost.config import DataConfig, SourceConfig
from rlpost.errors import ConfigError, DataError, UserError
from rlpost.preflight.checks import check
from rlpost.prompts.chat_template import ChatTemplate
from rlpost.prompts.conversion import is_reference
from rlpost.prompts.encoding import build_prompts, find_bad_reference, make_messages
from rlpost.prompts.rows import Row
from tests.data_rows import read_rows
from tests.tiny_models import CHATML, make_tokenizer, write_model

CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"
HUGE, HUGE_NUMBER = "9" * 5000, "stands for HUGE"  # which Python does not print


class Color(str, enum.Enum):  # noqa: UP042 - its str() is its name
    RED = "red"


class Image:
    pass


def generated(value):
    return SourceConfig(generator=lambda: [{"prompt": "q", "answer": "1", "column": value}])


def refused(row, **data):
    with pytest.raises(DataError) as caught:
        make_messages(Row(row, "d.jsonl line 3"), DataConfig(**data))
    message = str(caught.value)
    assert message.startswith("d.jsonl line 3: ") and "\n" not in message
    return message


# -- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((None, None), (True, True), (3, 3), (0.5, 0.5), ("a", "a"), (Color.RED, "red"), ((1, (2,)), [1, [2]])),
        *(
            (np.int64(3), 3),
            (np.float32(0.5), 0.5),
            (np.longdouble(0.5), 0.5),
            (np.bool_(True), True),
            (np.str_("a"), "a"),
        ),
        *(
            (np.arange(2), [0, 1]),
            (np.array(3), 3),
            (np.array(["a", None], object), ["a", None]),
            (np.zeros((1, 2)), [[0, 0]]),
        ),
        *((datetime.date(2020, 1, 2), "2020-01-02"), (datetime.datetime(2020, 1, 2, 3), "2020-01-02 03:00:00")),
        *((np.datetime64("2020-01-02", "ns"), "2020-01-02T00:00:00.000000000"), (decimal.Decimal("1.10"), "1.10")),
        *((uuid.UUID(int=1), str(uuid.UUID(int=1))), (Path("a/b"), "a/b"), ({"a": {1: (2,)}}, {"a": {"1": [2]}})),
    ],
)
def test_values_with_a_meaning(value, expected):
    (row,) = read_rows(generated(value))
    assert row["column"] == expected and type(row["column"]) is type(expected)
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("value", "got"),
    [
        *(
            (b"x", "bytes"),
            (np.bytes_(b"x"), "bytes_"),
            ([{"bytes": b"\x89PNG"}], "bytes"),
            (bytearray(b"x"), "bytearray"),
        ),
        *((Image(), "Image"), (np.array([Image()]), "Image"), ({1, 2}, "set"), (object, "type"), (1j, "complex")),
        *(
            (len, "builtin_function_or_method"),
            ("\ud800", "half a surrogate pair"),
        ),
        *(({"\ud800": 1}, "half a surrogate pair"), ({("a",): 1}, "a list as a key"), ({None: 1}, "null as a key")),
    ],
)
def test_values_without_one_name_row_and_column(value, got):
    with pytest.raises(DataError) as caught:
        read_rows(generated(value))
    message = str(caught.value)
    assert message.startswith("data.train.generator row 0: column column") and got in message
    assert "\n" not in message and "expected" in message


def test_a_value_that_holds_itself():
    value = []
    value.append(value)
    with pytest.raises(DataError, match="more than 100 levels"):
        read_rows(generated(value))
    with pytest.raises(DataError, match=r"row 0: column column: got a whole number of more than 4,300 digits"):
        read_rows(generated(-(10**4300)))


def test_whole_numbers_of_thousands_of_digits(tmp_path):
    """Python reads and writes 4,300 digits."""
    path = tmp_path / "d.jsonl"
    for row in (f'{{"prompt": "q", "answer": {HUGE}}}', f'{{"prompt": "q", "a": [{{"b": -{HUGE}}}]}}'):
        path.write_text(f'{{"prompt": "q", "answer": 1}}\n{row}\n')
        with pytest.raises(DataError) as caught:
            read_rows(SourceConfig(path=str(path)))
        assert "d.jsonl line 2: got a whole number of more than 4,300 digits" in str(caught.value)
    path.write_text(f'{{"prompt": "q", "answer": {HUGE[:4300]}, "x": {HUGE}e2, "y": 1e999, "z": NaN}}\n')
    (row,) = read_rows(SourceConfig(path=str(path)))
    assert row["answer"] == int(HUGE[:4300])  # the longest that is read
    assert json.loads(json.dumps(row))["answer"] == row["answer"]


def test_nested_too_deeply_for_whoever_writes_it_again(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "q", "a": ' + "[" * 99 + "]" * 99 + "}\n")
    assert len(read_rows(SourceConfig(path=str(path)))) == 1
    path.write_text('{"prompt": "q", "a": ' + "[" * 300 + "]" * 300 + "}\n")
    with pytest.raises(DataError, match=r"d\.jsonl line 1: column a: got more than 100 levels"):
        read_rows(SourceConfig(path=str(path)))
    path.write_text('{"prompt": "q", "a": "' + "[{" * 300 + '"}\n')  # brackets in text are none
    assert len(read_rows(SourceConfig(path=str(path)))) == 1


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "answer": "1", "day": datetime.date(2020, 1, 2), "x": None},
        {"prompt": [{"role": "user", "content": "r"}], "answer": "2", "day": None, "x": [1.5]},
    ]
    path = tmp_path / "data.bin"  # known by its first bytes, not by its name
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = read_rows(SourceConfig(path=str(path)))
    assert [row.origin for row in loaded] == [f"{path} row 0", f"{path} row 1"]
    assert loaded[0] == {**rows[0], "day": "2020-01-02"} and loaded[1] == rows[1]
    assert make_messages(loaded[0], DataConfig()) == rows[0]["prompt"]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q", "image": b"\x89PNG"}]), path)
    with pytest.raises(DataError, match=r"data\.bin row 0: column image: got bytes"):
        read_rows(SourceConfig(path=str(path)))
    parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), path)
    with pytest.raises(DataError, match="is empty"):
        read_rows(SourceConfig(path=str(path)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="as Parquet") as caught:
        read_rows(SourceConfig(path=str(path)))
    assert "\n" not in str(caught.value)


# -- messages ------------------------------------------------------------------------------------------------------


def user(content, **more):
    return {"prompt": [{"role": "user", "content": content, **more}]}


def test_text_parts_are_joined_by_line_ends():
    parts = [{"type": "text", "text": "Look."}, {"type": "text", "text": "What is 1+1?", "image_url": None}]
    assert make_messages(user(parts), DataConfig(template="<{prompt}>")) == user("<Look.\nWhat is 1+1?>")["prompt"]
    assert make_messages(user("q", tool_calls=None, name="", x=[], y={}), DataConfig()) == user("q")["prompt"]


@pytest.mark.parametrize(
    ("row", "got"),
    [
        (user(None), "prompt: message 1 (user): content: got null; expected text"),
        (user(3), "content: got a number"),
        (user(True), "content: got true"),
        (user({"text": "q"}), "content: got a mapping"),
        (user([]), "content: got an empty list"),
        (user(["q"]), "content part 1: got text; expected type text and a text"),
        (user([{"type": "text", "text": "q"}, {"type": "image", "image": "a.png"}]), "content part 2: got type image"),
        (user([{"type": "text", "text": None}]), "content part 1: got null as text"),
        (user([{"type": "text", "text": "q", "image": "a.png"}]), "content part 1: got image in it"),
        (user([{"text": "q"}]), "content part 1: got type null"),
        (user([{"type": ["text"], "text": "q"}]), "got type a list"),
        (user("q", tool_calls=[{"id": 1}]), "message 1: got tool_calls, which is not supported for user"),
        (user("q", name="Ann"), "got name, which is not supported"),
        (user("q", weight=0), "got weight, which is not supported"),
        ({"prompt": [{"role": None, "content": "q"}]}, "role: got null"),
        ({"prompt": [{"role": 1, "content": "q"}]}, "role: got a number"),
        ({"prompt": [{"role": "", "content": "q"}]}, "role: got empty text"),
        (
            {"prompt": [{"from": "human", "value": "q"}]},
            "got no role (its keys are from, value); expected role and content",
        ),
        ({"prompt": [{"role": "user"}]}, "got no content"),
        ({"prompt": [{}]}, "got no role (its keys are none)"),
        ({"prompt": ["q"]}, "message 1: got text; expected text, or a list of chat messages"),
        ({"prompt": [None]}, "message 1: got null"),
        ({"prompt": []}, "prompt: got an empty list"),
        ({"prompt": None}, "prompt: got null"),
        ({"prompt": 3}, "prompt: got a number"),
        ({"prompt": {"role": "user", "content": "q"}}, "prompt: got a mapping"),
        ({"prompt": [[{"role": "user", "content": "q"}]]}, "message 1: got a list"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(row, got):
    assert got in refused(row)


def test_a_second_system_message_is_refused_and_one_is_not():
    own = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]}
    assert "a system message beside data.system_prompt" in refused(own, system_prompt="Think.")
    assert make_messages(own, DataConfig()) == own["prompt"]
    assert make_messages({"prompt": "q"}, DataConfig(system_prompt="Think."))[0]["content"] == "Think."


def test_the_template_goes_round_the_last_message_of_the_user():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "The sum is"},
    ]
    made = make_messages({"prompt": messages}, DataConfig(template="<{prompt}>"))
    assert [m["content"] for m in made] == ["a", "b", "<c>", "The sum is"]
    made = make_messages({"prompt": messages[1:2]}, DataConfig(template="<{prompt}>"))
    assert [m["content"] for m in made] == ["<b>"]


# -- template ------------------------------------------------------------------------------------------------------


def test_what_may_stand_in_braces():
    row = {"prompt": "q", "n": 3, "x": 0.5, "meta": {"unit": "km", "list": ["a", "b"]}, "a.b": "dots"}
    template = "{prompt} {n} {x:.2f} {meta.unit} {meta[unit]} {meta.list[1]} {a.b} {{}}"
    assert make_messages(row, DataConfig(template=template))[0]["content"] == "q 3 0.50 km km b dots {}"


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}, [], float("nan"), float("inf")])
def test_what_may_not(value):
    message = refused({"prompt": "q", "unit": value}, template="{unit}: {prompt}")
    assert "data.template: got " in message and "in braces; expected text or a number" in message


@pytest.mark.parametrize(
    "template", ["{prompt!r}", "{prompt!s}", "{prompt.upper}", "{prompt[0]}", "{}", "{0}", "{no}", "{x"]
)
def test_templates_that_cannot_be(template):
    with pytest.raises(ConfigError, match=r"d\.jsonl line 3: data\.template: ") as caught:
        make_messages(Row({"prompt": "q"}, "d.jsonl line 3"), DataConfig(template=template))
    assert "\n" not in str(caught.value)


# -- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["2", "", 0, False, 0.5, ["2", "2.0"], {"inputs": []}, [[1]], 10**400])
def test_usable_references(value):
    assert is_reference(value)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        *(
            (None, "null"),
            ([], "an empty list"),
            ({}, "an empty mapping"),
            (float("nan"), "a number that is not finite"),
        ),
        *(([None], "a list that holds null"), (["2", [None]], "a list that holds a list that holds null")),
    ],
)
def test_unusable_references(value, got):
    line = find_bad_reference(Row({"prompt": "q", "answer": value}, "d.jsonl line 3"), DataConfig())
    assert line.startswith(f"d.jsonl line 3: answer: got {got}; expected a reference for the reward; ")
    assert not find_bad_reference({"prompt": "q", "answer": value}, DataConfig(reference_key=None))


# -- any row -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HUGE_NUMBER),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None]), "text": JSON}), max_size=3)
CONTENTS = st.text(max_size=8) | PARTS | JSON
ROLES = st.sampled_from(["user", "assistant", "system", "tool", ""]) | JSON
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}, optional={"tool_calls": JSON, "name": JSON}), max_size=4
)
ROWS = st.fixed_dictionaries(
    {}, optional={"prompt": st.text(max_size=8) | MESSAGES | JSON, "answer": JSON, "unit": JSON, "task": JSON}
)
TEMPLATES = st.sampled_from(["{prompt}", "{unit} {prompt}", "{unit[a]}{prompt}", "{unit.a} {prompt}"])
REPRS = ("None", "True", "{'", "['", "[None", "[{", "nan", "inf", "<object")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With and without a chat template: (folder, tokenizer)."""
    made = {}
    for name, chat in (("chat", CHATML), ("plain", None)):
        tokenizer = make_tokenizer(chat=chat)
        made[name] = (write_model(tmp_path_factory.mktemp(name), tokenizer=tokenizer), tokenizer)
    return made


def texts_in(value):
    """Every text of a row, at any depth."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_in(item)
    if isinstance(value, dict):
        yield from value


def outcome(step):
    """What a step makes, or its line; anything but a UserError of one line is a failure of ours."""
    try:
        return step()
    except UserError as error:
        assert str(error).isprintable(), str(error)
        return error


@given(
    row=ROWS,
    template=TEMPLATES,
    name=st.sampled_from(["chat", "plain"]),
    system=st.sampled_from([None, "S"]),
    prefill=st.sampled_from([None, "<think>\n"]),
)
@example(
    row={"prompt": [{"role": "user", "content": None}], "answer": "1"},
    template="{prompt}",
    name="chat",
    system=None,
    prefill=None,
)
@example(
    row={"prompt": "q", "unit": None, "answer": "1"},
    template="{unit} {prompt}",
    name="plain",
    system=None,
    prefill=None,
)
@example(row={"prompt": "", "answer": "1"}, template="{prompt}", name="plain", system=None, prefill=None)
@example(row={"prompt": ""}, template="{prompt}", name="plain", system=None, prefill=None)
@example(row={"prompt": "", "answer": None}, template="{prompt}", name="plain", system=None, prefill=None)
@example(
    row={"prompt": [{"\x1e": "", "a\nb": "", "\x1b[31m": ""}]},
    template="{prompt}",
    name="chat",
    system=None,
    prefill=None,
)
@example(row={"prompt": "q", "answer": [None]}, template="{prompt}", name="chat", system="S", prefill="So")
@settings(max_examples=150, deadline=None)
def test_any_row_ends_in_a_prompt_or_in_one_line(models, row, template, name, system, prefill, tmp_path_factory):
    """Through the file, check and prompt building, which must agree; never with Python's notation in a prompt."""
    from rlpost.config import Config

    folder, tokenizer = models[name]
    path = tmp_path_factory.getbasetemp() / "row.jsonl"
    path.write_text(json.dumps(row).replace(f'"{HUGE_NUMBER}"', HUGE) + "\n")
    cfg = Config(name="run", runs_dir=str(path.parent / "runs"), device="cpu")
    cfg.model.path, cfg.data.train.path, cfg.eval.every = str(folder), str(path), -1
    cfg.data.template, cfg.data.system_prompt, cfg.rollout.max_response_tokens = template, system, 32
    cfg.data.prefill = prefill
    checked = outcome(lambda: check(cfg))

    def build():
        rows = read_rows(cfg.data.train)
        built = build_prompts(rows, cfg.data, tokenizer, max_prompt_tokens=480)
        return DataError(built.bad_reference) if built.bad_reference else built.prompts[0]

    built = outcome(build)
    assert isinstance(checked, Exception) == isinstance(built, Exception), (checked, built)
    if isinstance(built, Exception):
        assert str(checked) == str(built)
        return
    given_texts = "\n".join(texts_in(row)) + template
    for text in (built.text, tokenizer.decode(built.token_ids)):
        assert not [mark for mark in REPRS if mark in text and mark not in given_texts]


# -- the inputs of public reports ----------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="the collection is not beside this checkout; its kinds are tested above")
@pytest.mark.parametrize(
    ("name", "line", "got"),
    [
        ("answer_null", 4, "answer: got null"),
        ("answer_list", 0, ""),
        ("content_parts", 0, ""),
        ("content_parts_image", 1, "part 1: got type image"),
        ("content_none", 1, "tool_calls and a chat template that never reads them"),
        ("huge_int", 1, "a whole number of more than 4,300 digits"),
        ("prefill", 0, ""),
        ("system_inside", 0, ""),
        ("good", 0, ""),
    ],
)
def test_the_collection(models, tmp_path, name, line, got):
    from rlpost.config import Config

    cfg = Config(name="run", runs_dir=str(tmp_path), device="cpu")
    cfg.model.path, cfg.data.train.path = str(models["chat"][0]), str(CASES / f"{name}.jsonl")
    cfg.eval.every, cfg.rollout.max_response_tokens, cfg.reward.function = -1, 32, "math"
    checked = outcome(lambda: check(cfg))
    assert (f"{name}.jsonl line {line}: " in str(checked) and got in str(checked)) if line else not got
    assert isinstance(checked, Exception) == bool(line)


def test_chatml_is_a_template():
    assert ChatTemplate(CHATML, {})
