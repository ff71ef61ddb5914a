"""Our rendering of a chat template against transformers', its errors, and its clock."""

from datetime import datetime

import numpy as np
import pytest

from rlpost.config import DataConfig
from rlpost.errors import ConfigError, DataError, ModelError, UserError
from rlpost.models.tokenizer import load_tokenizer
from rlpost.prompts.chat_template import RESERVED, ChatTemplate, check_arguments, read_chat_template, read_template_key
from rlpost.prompts.encoding import add_prefill, build_prompts, count_appended, make_messages
from rlpost.prompts.rows import Row
from rlpost.rewards.functions import load_functions
from rlpost.rewards.scoring import RewardScorer, make_decode
from rlpost.rewards.worker_pool import InlineCalls
from tests.tiny_models import CHATML, DATED, OPTIONAL, TEMPLATES, THINKING, make_tokenizer, write_model

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
    return read_chat_template(folder, DataConfig()), AutoTokenizer.from_pretrained(str(folder))


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
        assert read_chat_template(folder, DataConfig()).render(turns("a"), origin="", started=NOW) in ("a!", "!")
        assert read_chat_template(folder, DataConfig())._special_tokens == {"bos_token": "<s>"}
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    for data in (DataConfig(), DataConfig(chat="never"), DataConfig(chat_template="{{ 1 }}")):
        with pytest.raises(ModelError, match="the chat template cannot be read: UnicodeDecodeError"):
            read_chat_template(folder, data)
    whole = write_model(tmp_path / "whole")
    (whole / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="utf-8"):  # nor does a run get further
        load_tokenizer(str(whole))
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_chat_template(folder, DataConfig()).source == "file"  # wins, as with transformers
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(folder, DataConfig()) is None


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


# -- a template of the configuration's own -------------------------------------------------------------------------


def encode(messages, tokenizer, folder=None, **keys):
    """The prompt of a row, decoded: as transformers renders it and, with the model's folder, as we do; both agree."""
    row, data = Row({"prompt": messages}, "d.jsonl line 7"), DataConfig(reference_key=None, **keys)
    (prompt,) = build_prompts([row], data, tokenizer, max_prompt_tokens=None, started=NOW).prompts
    text = tokenizer.decode(prompt.token_ids)
    if folder is not None:
        ours = read_chat_template(folder, data).render(make_messages(row, data), origin=row.origin, started=NOW)
        assert add_prefill(ours, data, row.origin, is_chat=True) == text
    return text


def one_line(call, kind=ConfigError):
    with pytest.raises(UserError) as caught:
        call()
    assert isinstance(caught.value, kind) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """(tokenizer, its folder) with a template in the style of Qwen3's."""
    tokenizer = make_tokenizer(chat=THINKING)
    return tokenizer, write_model(tmp_path_factory.mktemp("thinking"), tokenizer=tokenizer)


def test_a_file_or_a_text_takes_the_place_of_the_tokenizers(tmp_path, thinking):
    file = tmp_path / "mine.jinja"
    file.write_text("[{{ messages[0].content }}]é", encoding="utf-8")
    plain = make_tokenizer(chat=None)
    for tokenizer, folder in (thinking, (plain, None)):
        for value in (str(file), "[{{ messages[0].content }}]é"):
            assert encode("q", tokenizer, folder, chat_template=value) == "[q]é"
            assert encode("q", tokenizer, folder, chat_template=value, chat="always") == "[q]é"
    assert read_template_key("a\nb") == "a\nb", "a line break: the template itself"
    assert read_template_key("{% raw %}x{% endraw %}").startswith("{% raw")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nosuch.jinja", "nosuch.jinja (nothing there)"),
        ("[INST] [/INST]", "(nothing there)"),
        ("", "nothing there"),
        (".", ". (a folder)"),
        ("empty.jinja", "(an empty file)"),
        ("latin.jinja", "cannot be read: latin.jinja: 'utf-8' codec"),
        ("{% if %}", "cannot be read: Expected an expression"),
        ("{{ a | nosuch }}", "cannot be read: No filter named 'nosuch'"),
    ],
)
def test_a_template_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jinja").write_text("\n")
    (tmp_path / "latin.jinja").write_bytes(b"{{ messages }}\xe9")
    message = one_line(lambda: encode("q", make_tokenizer(), chat_template=value))
    assert message.startswith("data.chat_template: ") and said in message


def test_several_templates_without_a_default_are_refused(tmp_path):
    import json

    tokenizer = make_tokenizer()
    folder = write_model(tmp_path, tokenizer=tokenizer)
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name + " {{ messages[0].content }}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "not this"}]  # files come first
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder))
    message = one_line(lambda: encode("q", loaded), ModelError)
    assert "chat templates named rag, tool_use" in message and "set data.chat_template to the file" in message
    assert one_line(lambda: read_chat_template(folder, DataConfig()), ModelError) == message
    chosen = str(folder / "additional_chat_templates" / "rag.jinja")
    assert encode("q", loaded, folder, chat_template=chosen) == "rag q"
    assert read_chat_template(folder, DataConfig(chat="never")) is None and encode("q", loaded, chat="never") == "q"


# -- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_reach_the_template(thinking, tmp_path):
    assert encode("q", *thinking).endswith("assistant\n")
    assert encode("q", *thinking, chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n")
    off = encode("q", *thinking, chat_template_kwargs={"enable_thinking": False})
    assert off.endswith("assistant\n<think>\n\n</think>\n\n")
    dated = make_tokenizer(chat=OPTIONAL, bos="<|endoftext|>")
    folder = write_model(tmp_path, tokenizer=dated)
    assert "Today Date: 26 Jul 2024\n" in encode("q", dated, folder)
    assert "Today Date: soon\n" in encode("q", dated, folder, chat_template_kwargs={"date_string": "soon"})


def test_an_argument_that_the_template_never_reads_is_a_typo(thinking):
    tokenizer, folder = thinking
    for kwargs, expected in (
        ({"enable_thinkin": False}, "expected names that the chat template reads (enable_thinking)"),
        ({"enable_thinking": False, "thinking": True}, "got 'thinking'"),
        ({"messages_": []}, "got 'messages_'"),
    ):
        message = one_line(lambda kwargs=kwargs: encode("q", tokenizer, chat_template_kwargs=kwargs))
        assert message.startswith("data.chat_template_kwargs: ") and expected in message
        data = DataConfig(chat_template_kwargs=kwargs)
        assert one_line(lambda data=data: read_chat_template(folder, data)) == message
    none = one_line(lambda: encode("q", make_tokenizer(), chat_template_kwargs={"a": 1}))
    assert "expected none: the template reads none" in none
    plain = one_line(lambda: encode("q", make_tokenizer(chat=None), chat_template_kwargs={"a": 1}))
    assert "got 'a'; expected a tokenizer with a chat template" in plain


def test_what_rlpost_passes_itself_is_reserved():
    """Every parameter of transformers on the way to the template: as an argument it would change what is rendered."""
    import inspect

    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        parameters = inspect.signature(function).parameters.values()
        assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= RESERVED
    assert set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) <= RESERVED
    for name in ("add_generation_prompt", "strftime_now", "bos_token"):
        message = one_line(lambda name=name: check_arguments(DataConfig(chat_template_kwargs={name: True})))
        assert message.startswith(f"data.chat_template_kwargs: got '{name}'; expected arguments of the template's own")


@pytest.mark.parametrize(
    "value", [b"x", float("nan"), float("inf"), {1, 2}, {1: 2}, object(), datetime(2026, 1, 1), (1, 2)]
)
def test_arguments_are_json(value):
    message = one_line(lambda: check_arguments(DataConfig(chat_template_kwargs={"a": {"b": [value]}})))
    assert message.startswith("data.chat_template_kwargs.a: got ") and "a value that JSON has a form for" in message


def test_arguments_of_every_json_form_are_fine():
    check_arguments(DataConfig(chat_template_kwargs={"a": [None, True, 1, 0.5, "x", {"b": []}]}))


# -- the beginning of every response -------------------------------------------------------------------------------


def test_the_prefill_follows_the_generation_prompt(thinking):
    tokenizer, _ = thinking
    assert encode("q", *thinking, prefill="<think>\n").endswith("assistant\n<think>\n")
    assert encode("q", *thinking, prefill="{n} \\boxed{").endswith("assistant\n{n} \\boxed{"), "braces are literal"
    assert encode("q", *thinking, prefill="") == encode("q", *thinking)
    plain = make_tokenizer(chat=None)
    assert encode("q", plain, prefill=" is") == "q is" == encode("q", tokenizer, chat="never", prefill=" is")


def test_the_prefill_is_encoded_in_one_string_with_the_prompt():
    tokenizer, data = make_tokenizer(chat=None), DataConfig(reference_key=None, prefill="um of")
    (prompt,) = build_prompts([{"prompt": "the s"}], data, tokenizer, max_prompt_tokens=None).prompts
    assert list(prompt.token_ids) == tokenizer.encode("the sum of")
    assert list(prompt.token_ids) != tokenizer.encode("the s") + tokenizer.encode("um of")


def test_the_text_for_rewards_has_the_prefill_where_there_is_no_template():
    """A program that continues the prompt is complete then; in a chat the text is the question."""
    for chat, text in (("auto", "q"), ("never", "q<think>")):
        data = DataConfig(reference_key=None, chat=chat, prefill="<think>")
        (prompt,) = build_prompts([{"prompt": "q"}], data, make_tokenizer(), max_prompt_tokens=None).prompts
        assert prompt.text == text


def test_two_beginnings_of_a_response_are_refused(thinking):
    row = [*turns("q"), {"role": "assistant", "content": "The sum is"}]
    for chat in ("auto", "never"):
        message = one_line(lambda chat=chat: encode(row, thinking[0], prefill="So", chat=chat), DataError)
        assert message.startswith("d.jsonl line 7: got a last message of the assistant beside data.prefill; expected")
    opened = make_tokenizer(chat=CHATML.replace("assistant\n", "assistant\n<think>\n"))
    message = one_line(lambda: encode("q", opened, prefill="<think>"), DataError)
    assert "d.jsonl line 7: got a chat template that ends with data.prefill, '<think>'; expected it once" in message
    assert encode("q", opened, prefill="Let me").endswith("<think>\nLet me")


@pytest.mark.parametrize(
    ("prefill", "response", "reward"),
    [
        ("<think>\n", "5", 0.0),  # an unfinished thought has no answer
        ("<think>\n", "6</think>5", 1.0),
        ("<think>\n\n</think>\n\n", "5", 1.0),
        ("The answer is ", "5", 1.0),
    ],
)
def test_a_prefill_that_opens_a_thought(prefill, response, reward):
    """``reward.text=answer`` knows it as a prompt that ends in ``<think>``."""
    from rlpost.config import RewardConfig

    tokenizer = make_tokenizer()
    (prompt,) = build_prompts(
        [{"prompt": "2+3?", "answer": "5"}], DataConfig(prefill=prefill), tokenizer, max_prompt_tokens=None
    ).prompts
    calls = InlineCalls(load_functions(RewardConfig(function="last_number"), "answer"))
    scorer = RewardScorer(calls, make_decode(tokenizer, [2]), group_size=1, retries=0)
    scorer.submit(prompt, 0, [np.array(tokenizer.encode(response), np.int32)], "stop")
    (result,) = scorer.poll()
    assert result.reward == reward


def test_prompts_change_with_each_of_the_three_keys(thinking):
    """So a resume with another value is refused by the digest."""

    def digest(**keys):
        data = DataConfig(reference_key=None, **keys)
        return build_prompts([{"prompt": "q"}], data, thinking[0], max_prompt_tokens=None).digest

    values = ({}, {"chat_template": CHATML + " "}, {"chat_template_kwargs": {"enable_thinking": False}})
    assert len({digest(**keys) for keys in (*values, {"prefill": "So"})}) == 4


# -- the clock, and tokens -----------------------------------------------------------------------------------------


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
