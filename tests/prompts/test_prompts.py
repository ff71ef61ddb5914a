"""Reading rows, building prompts, and the order of draws."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.config import DataConfig, SourceConfig
from rlpost.errors import ConfigError, DataError
from rlpost.prompts.cursor import PromptCursor, draw_prompts
from rlpost.prompts.encoding import build_prompts, make_messages
from rlpost.prompts.rows import look_up
from tests.data_rows import read_rows

TINY = Path(__file__).parents[1] / "fixtures" / "gsm8k_tiny.jsonl"


class CharTokenizer:
    """One token a character; the chat template is a real, if small, Jinja template's output written by hand."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, chat_template):
        assert not tokenize
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceConfig(path=str(path))


def test_jsonl_rows_keep_their_columns_and_line_numbers(tmp_path):
    rows = read_rows(write(tmp_path / "d.jsonl", '{"prompt": "a"}', "", '{"prompt": "b", "answer": 3}'))
    assert [dict(r) for r in rows] == [{"prompt": "a"}, {"prompt": "b", "answer": 3}]
    assert [r.origin.rpartition(" ")[2] for r in rows] == ["1", "3"]  # the blank line counts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "not JSON"),
        ("[1, 2]", "got list"),
        ("prompt,answer", "not JSON"),
        ('{"prompt": "\\ud83d"}', "a lone surrogate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    source = write(tmp_path / "d.jsonl", '{"prompt": "a"}', line)
    with pytest.raises(DataError, match=rf"d\.jsonl line 2: .*{reason}"):
        read_rows(source)


def test_a_line_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(SourceConfig(path=str(path)))


def test_the_mark_that_windows_editors_write_and_whole_surrogate_pairs_are_fine(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude00"}\n')
    assert read_rows(SourceConfig(path=str(path))) == [{"prompt": "\U0001f600"}]


def dated_rows():
    return [
        {
            "prompt": "a",
            "answer": np.int64(3),
            "when": datetime.date(2020, 1, 2),
            "parts": (1, np.float64(0.5)),
            "vector": np.arange(2),
        }
    ]


def test_columns_are_json_values_so_that_a_checkpoint_gives_back_what_the_reward_saw():
    (row,) = read_rows(SourceConfig(generator=dated_rows))
    assert row == {"prompt": "a", "answer": 3, "when": "2020-01-02", "parts": [1, 0.5], "vector": [0, 1]}
    assert json.loads(json.dumps(row)) == row and type(row["answer"]) is int
    with pytest.raises(DataError, match=r"generator row 0: column a: got a list as a key; expected keys that are text"):
        read_rows(SourceConfig(generator=lambda: [{"a": {("b", "c"): 1}}]))


def test_missing_empty_and_no_source(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        read_rows(SourceConfig(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="a folder"):
        read_rows(SourceConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="is empty"):
        read_rows(write(tmp_path / "e.jsonl", "", ""))
    with pytest.raises(ConfigError, match=r"data\.eval: no source"):
        read_rows(SourceConfig(), key="data.eval")
    with pytest.raises(DataError, match="no rows"):
        read_rows(SourceConfig(path=str(TINY), limit=0))


def test_generator_limit_and_unique():
    generator = {"_target_": "rlpost.tasks.arithmetic.problems", "count": 9, "split": "eval"}
    rows = read_rows(SourceConfig(generator=generator, limit=4))
    assert len(rows) == 4 and {"prompt", "answer"} <= set(rows[0])
    repeated = repeated_rows
    assert [r["id"] for r in read_rows(SourceConfig(generator=repeated, unique=True))] == [0, 1]
    assert len(read_rows(SourceConfig(generator=repeated))) == 4
    with pytest.raises(DataError, match="expected a list of mappings"):
        read_rows(SourceConfig(generator={"_target_": "time.time"}))


def repeated_rows():
    return [{"prompt": [{"role": "user", "content": c}], "id": i} for i, c in enumerate("abab")]


def test_the_fixture_is_real_gsm8k():
    rows = read_rows(SourceConfig(path=str(TINY)))
    assert len(rows) >= 8 and all("####" in r["answer"] for r in rows)


def test_template_columns_and_braces():
    data = DataConfig(prompt_key="question", reference_key="answer", template="{unit}: {prompt} \\boxed{{}}")
    row = {"question": "a {b}?", "answer": 1, "unit": "km"}
    prompt = build_prompts([row], data, CharTokenizer(), max_prompt_tokens=None).prompts[0]
    assert prompt.text == "km: a {b}? \\boxed{}"  # braces in the data are left alone
    assert "".join(map(chr, prompt.token_ids[1:])) == prompt.text and prompt.token_ids[0] == 1
    assert prompt.reference == 1 and prompt.columns == {"unit": "km"} and prompt.uid == ""
    with pytest.raises(ConfigError, match=r"data\.template: KeyError\('nosuch'\)"):
        make_messages({"prompt": "a"}, DataConfig(template="{nosuch}"))


def test_chat_template_is_used_when_there_is_one():
    data = DataConfig(reference_key=None, system_prompt="S")
    prompts = build_prompts([{"prompt": "q"}], data, CharTokenizer("T"), max_prompt_tokens=None).prompts
    assert "".join(map(chr, prompts[0].token_ids)) == "<system>S<user>q<assistant>"  # and no start token of its own
    plain = build_prompts([{"prompt": "q"}], data, CharTokenizer(), max_prompt_tokens=None).prompts
    assert "".join(map(chr, plain[0].token_ids[1:])) == "S\n\nq"
    data.chat = "never"
    never = build_prompts([{"prompt": "q"}], data, CharTokenizer("T"), max_prompt_tokens=None).prompts
    assert list(never[0].token_ids) == list(plain[0].token_ids)
    data.chat = "always"
    with pytest.raises(ConfigError, match="chat template"):
        build_prompts([{"prompt": "q"}], data, CharTokenizer(), max_prompt_tokens=None)


def test_a_column_of_messages_and_dotted_columns():
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "reward_model": {"ground_truth": "7"},
    }
    data = DataConfig(reference_key="reward_model.ground_truth", template="[{prompt}]")
    prompt = build_prompts([row], data, CharTokenizer("T"), max_prompt_tokens=None).prompts[0]
    assert "".join(map(chr, prompt.token_ids)) == "<system>s<user>[q]<assistant>" and prompt.reference == "7"
    assert row["prompt"][1]["content"] == "q"  # the row is not changed
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1  # a column of that very name comes first


def test_missing_column_names_line_and_columns(tmp_path):
    rows = read_rows(write(tmp_path / "d.jsonl", '{"question": "a"}'))
    with pytest.raises(DataError, match=r"line 1: no column 'prompt'; its columns are question"):
        build_prompts(rows, DataConfig(), CharTokenizer(), max_prompt_tokens=None)
    with pytest.raises(DataError, match="row: prompt: got a number; expected text, or a list of chat messages"):
        build_prompts([{"prompt": 3}], DataConfig(), CharTokenizer(), max_prompt_tokens=None)


def test_long_prompts_stop_or_are_dropped_with_a_count(tmp_path):
    rows = read_rows(write(tmp_path / "d.jsonl", '{"prompt": "ab"}', '{"prompt": "abcd"}'))
    data = DataConfig(reference_key=None)
    assert build_prompts(rows, data, CharTokenizer(), max_prompt_tokens=5).num_dropped == 0  # 1 + 4 tokens just fit
    with pytest.raises(DataError, match=r"line 2: the prompt has 5 tokens; expected at most 4"):
        build_prompts(rows, data, CharTokenizer(), max_prompt_tokens=4)
    data.long_prompts = "drop"
    kept = build_prompts(rows, data, CharTokenizer(), max_prompt_tokens=4)
    assert kept.num_dropped == 1 and [p.text for p in kept.prompts] == ["ab"]
    with pytest.raises(DataError, match="all 2 prompts"):
        build_prompts(rows, data, CharTokenizer(), max_prompt_tokens=1)


@given(num_rows=st.integers(1, 40), seed=st.integers(0, 2**31), stop=st.integers(0, 120), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch_and_resuming_changes_nothing(num_rows, seed, stop, shuffle):
    whole = PromptCursor(num_rows, seed, shuffle)
    draws = [whole.draw() for _ in range(stop + 2 * num_rows)]
    assert len({uid for uid, _ in draws}) == len(draws)
    for epoch in range(len(draws) // num_rows):
        rows = [row for _, row in draws[epoch * num_rows : (epoch + 1) * num_rows]]
        assert sorted(rows) == list(range(num_rows))
        assert shuffle or rows == list(range(num_rows))
    first = PromptCursor(num_rows, seed, shuffle)
    before = [first.draw() for _ in range(stop)]
    second = PromptCursor(num_rows, seed, shuffle)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.draw() for _ in range(2 * num_rows)] == draws
    assert [whole.find_row(uid) for uid, _ in draws] == [row for _, row in draws]


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        cursor = PromptCursor(50, seed)
        return [cursor.find_row(f"{epoch}:{i}") for i in range(50)]

    assert order(0, 0) == order(0, 0) != order(1, 0)
    orders = [order(0, epoch) for epoch in range(4)] + [list(range(50))]
    assert len({tuple(o) for o in orders}) == 5  # every epoch has an order of its own, none the file's


def test_resuming_with_other_data_is_refused():
    def digest(*texts, answer="1"):
        rows = [{"prompt": text, "answer": answer} for text in texts]
        return build_prompts(rows, DataConfig(), CharTokenizer(), max_prompt_tokens=None).digest

    state = PromptCursor(2, 1, content=digest("a", "b")).state_dict()
    PromptCursor(2, 1, content=digest("a", "b")).load_state_dict(state)
    changed = [digest("b", "a"), digest("a", "c"), digest("a", "b", answer="2")]
    for other in (
        PromptCursor(3, 1, content=state["content"]),
        PromptCursor(2, 2, content=state["content"]),
        PromptCursor(2, 1, shuffle=False, content=state["content"]),
        *(PromptCursor(2, 1, content=content) for content in changed),
    ):
        with pytest.raises(DataError, match="resuming"):
            other.load_state_dict(state)


def test_draw_prompts_draws_only_when_asked():
    data = DataConfig(reference_key=None)
    prompts = build_prompts([{"prompt": "a"}, {"prompt": "b"}], data, CharTokenizer(), max_prompt_tokens=None)
    cursor = PromptCursor(2, shuffle=False)
    drawn = draw_prompts(cursor, [prompts])
    assert cursor.state_dict()["position"] == 0
    first = [next(drawn) for _ in range(3)]
    assert [(p.uid, p.text) for p in first] == [("0:0", "a"), ("0:1", "b"), ("1:0", "a")]
    assert cursor.state_dict()["position"] == 1
