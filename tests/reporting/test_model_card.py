"""The card says what the run was; hubs can read its front matter."""

from dataclasses import asdict, replace

import yaml

from rlpost.config import Config
from rlpost.reporting.model_card import model_card


def evaluation(step, accuracy):
    return {
        "step": step,
        "eval/accuracy": accuracy,
        "eval/accuracy_low": accuracy - 0.01,
        "eval/accuracy_high": accuracy + 0.01,
        "eval/response_tokens": 25.4,
    }


def card(path="Qwen/Qwen3-0.6B", evaluations=(), **changes):
    cfg = replace(Config(), name="my-run", **changes)
    cfg = replace(
        cfg, model=replace(cfg.model, path=path), data=replace(cfg.data, train=replace(cfg.data.train, hub="a/b"))
    )
    return model_card(asdict(cfg), step=7, evaluations=evaluations, totals={"samples": 2048.0, "tokens": 123456.0})


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_front_matter_names_the_base_model_only_where_a_hub_has_it():
    assert front(card())["base_model"] == "Qwen/Qwen3-0.6B"
    for local in ("rlpost://arithmetic", "/models/mine", "./mine", "../x", "models/mine/v2"):
        assert "base_model" not in front(card(local)), local
    assert "grpo" in front(card())["tags"]


def test_facts_and_first_and_last_evaluation():
    text = card(evaluations=[evaluation(0, 0.5), evaluation(5, 0.6), evaluation(7, 0.7)], steps=9)
    assert "# my-run" in text and "| Steps | 7 of 9 |" in text and "| Training data | `a/b`, split train |" in text
    assert "| Trained on | 2,048 responses, 123,456 tokens |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 5 |", "| 7 |"))]
    assert rows == ["| 0 | 50.0 % (49.0 to 51.0) | 25 |", "| 7 | 70.0 % (69.0 to 71.0) | 25 |"]
    assert "Evaluation" not in card()


def test_what_the_tokenizer_does_not_hold_of_the_prompts():
    data = Config().data
    text = card(data=replace(data, chat_template_kwargs={"enable_thinking": False}, prefill="<think>\n|`"))
    assert '| Chat template\'s arguments | `` {"enable_thinking": false} `` |' in text
    assert '| Responses begin with | `` "<think>\\n\\|`" `` |' in text
    assert "Responses begin with" not in card()
    old = asdict(Config())  # of a run that did not have these keys
    old["data"] = {
        name: value for name, value in old["data"].items() if name not in ("chat_template_kwargs", "prefill")
    }
    assert "# None" in model_card(old, step=0, evaluations=(), totals={"samples": 0.0, "tokens": 0.0})


def test_several_sources_are_named():
    cfg = replace(Config(), name="my-run")
    cfg.data.train.sources = {"a": {"path": "a.jsonl"}, "b": {"hub": "x/y", "split": "test"}}
    text = model_card(asdict(cfg), step=7, evaluations=(), totals={"samples": 1.0, "tokens": 1.0})
    assert "a: `a.jsonl`; b: `x/y`, split test" in text
