"""Our rendering of a chat template against transformers', its errors, and its clock."""

from datetime import datetime

import pytest

from rlpost.config import DataConfig
from rlpost.errors import DataError, ModelError
from rlpost.prompts.chat_template import ChatTemplate, read_chat_template
from rlpost.prompts.encoding import build_prompts, count_appended, make_messages
from rlpost.prompts.rows import Row
from tests.tiny_models import DATED, TEMPLATES, make_tokenizer, write_model

NOW = datetime(2026, 11, 30, 10, 0, 0, 123456)


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant", "user"]
    return [{"role": roles[n % len(roles)], "content": c} for n, c in enumerate(contents)]


CONVERSATIONS = [
    turns("What is 1+1?"),
    turns("  spaces \n", "<think>hm</think>\n\n2", "and 2+2?"),
    turns("Be brief.", "{{ messages }} {% raw %}", first="system"),
    turns("q", "The sum is"),
    turns("q", "<think>\nLet me", "r", "It ends in a space "),
    turns("q\u00e9\u65e5\U0001f600", 'it\'s "quoted" & <b>'),
    turns("a", "b", "c", "CONTINUE", "d"),
]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def both(request, tmp_path_factory):
    """(our template, transformers' tokenizer) of one folder."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(chat=TEMPLATES[request.param], bos="<|endoftext|>")
    folder = write_model(tmp_path_factory.mktemp(request.param), tokenizer=tokenizer)
    return read_chat_template(folder), AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_rendered_as_transformers_does(both, messages):
    """Through ``build_prompts``, which lets transformers render: the same text, or the same line."""
    template, tokenizer = both
    row = Row({"prompt": messages}, "d.jsonl line 7")
    data = DataConfig(reference_key=None)
    try:
        ours = template.render(make_messages(row, data), origin=row.origin, started=NOW)
    except DataError as refused:
        with pytest.raises(DataError) as caught:
            build_prompts([row], data, tokenizer, max_prompt_tokens=None, started=NOW)
        assert str(caught.value) == str(refused)
        assert "d.jsonl line 7: the chat template fails: " in str(refused) and "\n" not in str(refused)
        return
    (prompt,) = build_prompts([row], data, tokenizer, max_prompt_tokens=None, started=NOW).prompts
    assert tokenizer.decode(prompt.token_ids) == ours
    if messages[-1]["role"] == "assistant":
        assert ours.rstrip().endswith(messages[-1]["content"].rstrip())  # left open: the response continues it
    else:
        assert ours.rstrip().endswith(("assistant", "model"))


def test_templates_of_each_form_are_found(tmp_path):
    import json

    for number, template in enumerate(
        ["{{ messages[0].content }}!", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "!"}]]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = {"chat_template": template, "bos_token": {"content": "<s>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert read_chat_template(folder).render(turns("a"), origin="", started=NOW) in ("a!", "!")
        assert read_chat_template(folder)._special_tokens == {"bos_token": "<s>"}
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="the chat template cannot be read: UnicodeDecodeError"):
        read_chat_template(folder)
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_chat_template(folder).source == "file"  # wins, as with transformers
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(folder) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no\nway') }}", "no way"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ nosuch() }}", "undefined"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_whatever_a_template_raises_is_one_line_with_the_row(source, reason):
    row = Row({"prompt": "q"}, "d.jsonl line 3")
    with pytest.raises(DataError) as ours:
        ChatTemplate(source, {}).render(turns("q"), origin=row.origin, started=NOW)
    data = DataConfig(reference_key=None)
    with pytest.raises(DataError) as theirs:
        build_prompts([row], data, make_tokenizer(chat=source), max_prompt_tokens=None)
    assert str(ours.value) == str(theirs.value)
    assert str(ours.value).startswith("d.jsonl line 3: the chat template fails: ") and reason in str(ours.value)
    assert "expected another conversation than user" in str(ours.value) and "\n" not in str(ours.value)


def test_a_template_that_is_none_is_the_models_fault():
    for source in ("{% if %}", "{{ a", "{% nosuch %}"):
        with pytest.raises(ModelError, match="the chat template cannot be read") as ours:
            ChatTemplate(source, {})
        with pytest.raises(ModelError) as theirs:
            row = Row({"prompt": "q"}, "r")
            data = DataConfig(reference_key=None)
            build_prompts([row], data, make_tokenizer(chat=source), max_prompt_tokens=None)
        assert str(ours.value) == str(theirs.value)


def test_the_clock_stands_at_the_runs_start():
    def digest(started):
        data, tokenizer = DataConfig(reference_key=None), make_tokenizer(chat=DATED)
        made = build_prompts([{"prompt": "q"}], data, tokenizer, max_prompt_tokens=None, started=started)
        return made.digest, tokenizer.decode(made.prompts[0].token_ids)

    name, text = digest(NOW)
    assert "Today is 30 Nov 2026 10:00:00.123456." in text
    assert digest(NOW) == (name, text) and digest(datetime(2026, 11, 30)) != (name, text)
    assert digest(None) != digest(None), "without a start it is now"


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_prompt_does_not_end_in_what_the_tokenizer_appends(add_bos, add_eos):
    """Else the model would continue after the end of a text."""
    tokenizer = make_tokenizer(chat=None, bos="<|endoftext|>", add_bos=add_bos, add_eos=add_eos)
    assert count_appended(tokenizer.encode) == add_eos
    for text in ("What is 1+1?", "<|im_end|>", "a"):  # a text's own end token stays
        data = DataConfig(reference_key=None)
        (prompt,) = build_prompts([{"prompt": text}], data, tokenizer, max_prompt_tokens=None).prompts
        assert list(prompt.token_ids) == [0] * add_bos + tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_of_one_unknown_token_appends_nothing(tmp_path):
    from transformers import AutoTokenizer

    from rlpost.tasks.char_tokenizer import write_char_tokenizer

    write_char_tokenizer(tmp_path)  # "a" is none of its characters
    assert count_appended(AutoTokenizer.from_pretrained(str(tmp_path)).encode) == 0
