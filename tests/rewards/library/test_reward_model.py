"""The reward model against direct calls of transformers, on tiny random models with real tokenizers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlpost.config import RewardConfig
from rlpost.config.compose import load_config
from rlpost.errors import ConfigError, ModelError
from rlpost.preflight.checks import check
from rlpost.rewards.functions import Question, Response, load_functions
from rlpost.rewards.library.reward_model import RewardModel, fingerprint
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.worker_pool import RewardWorkers, choose_num_workers
from rlpost.types import Prompt
from tests.tiny_models import SHAPE, make_tokenizer

PROMPT = "What is the sum of two and three?"
RESPONSES = ["five", "The answer is five.", "", "I do not know, it may be six or seven or five.", "5", "five!"]
ROW = {"prompt": PROMPT, "reference": "5", "columns": {"level": 3}}


def write_classifier(folder, model_type="qwen2", *, num_labels=1, tokenizer=None, seed=0, **config):
    """A random classifier whose scores differ clearly from text to text."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = tokenizer or make_tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "initializer_range": 0.3, "num_labels": num_labels}
    if model_type == "bert":
        shape.pop("head_dim"), shape.pop("num_key_value_heads")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoConfig.for_model(model_type, **{**shape, "pad_token_id": 0, **config})
        AutoModelForSequenceClassification.from_config(made).float().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """No chat template, and a tokenizer that marks pairs."""
    tokenizer = make_tokenizer(chat=None, bos="<|im_start|>", add_bos=True, add_eos=True)
    return write_classifier(tmp_path_factory.mktemp("bert"), "bert", tokenizer=tokenizer)


def direct(folder, texts) -> list[float]:
    """One text at a time, nothing padded, as a user of transformers would."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    values = []
    for text in texts:
        inputs = tokenizer(*text, return_tensors="pt") if isinstance(text, tuple) else text(tokenizer)
        with torch.inference_mode():
            values.append(model(**inputs).logits[0].tolist())
    return [value[0] if len(value) == 1 else value for value in values]


def chat(response):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": response}]
    return lambda tokenizer: tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)


def rewards(model, responses=RESPONSES, **row):
    return [one["reward"] for one in model(responses, **{**ROW, **row})]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_scores_are_those_of_transformers_however_they_are_batched(qwen, bert, batch_size):
    for folder, texts in ((qwen, [chat(r) for r in RESPONSES]), (bert, [(PROMPT, r) for r in RESPONSES])):
        expected = direct(folder, texts)
        assert np.std(expected) > 0.1, "the model tells texts apart"
        np.testing.assert_allclose(rewards(RewardModel(str(folder), batch_size=batch_size)), expected, atol=1e-5)


def test_the_padding_side_of_the_tokenizer_does_not_matter(qwen, bert, tmp_path):
    for name, folder in (("qwen", qwen), ("bert", bert)):
        plain = rewards(RewardModel(str(folder)))
        import shutil

        other = shutil.copytree(folder, tmp_path / name)
        settings = other / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
        np.testing.assert_allclose(rewards(RewardModel(str(other))), plain, atol=1e-5)


def test_a_template_of_ones_own(bert):
    model = RewardModel(str(bert), template="{level} {reference} {response}")
    expected = direct(bert, [(f"3 5 {r}",) for r in RESPONSES])
    np.testing.assert_allclose(rewards(model), expected, atol=1e-5)
    assert model.required_columns == ("level",) and model.needs_reference
    (failure,) = model(["x"], **{**ROW, "columns": {}})
    assert failure.kind == "bad_column"


def test_labels_and_scores(tmp_path):
    names = {0: "bad", 1: "good", 2: "unclear"}
    folder = write_classifier(
        tmp_path / "model", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    logits = np.array(direct(folder, [chat(r) for r in RESPONSES]))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for settings, expected in (
        ({"label": "good"}, logits[:, 1]),
        ({"label": 2}, logits[:, 2]),
        ({"label": "good", "score": "sigmoid"}, 1 / (1 + np.exp(-logits[:, 1]))),
        ({"label": "bad", "score": "softmax"}, shares[:, 0]),
    ):
        np.testing.assert_allclose(rewards(RewardModel(str(folder), **settings)), expected, atol=1e-5)
    for label in (None, "fine", 3, True):
        with pytest.raises(ConfigError, match="reward model: label: .*bad, good, unclear"):
            RewardModel(str(folder), label=label)


def test_a_text_that_is_too_long_fails_or_is_cut_and_counted(qwen, bert):
    long = "five " * 60
    for folder in (qwen, bert):
        model = RewardModel(str(folder), max_tokens=48)
        short, failure = model(["5", long], **{**ROW, "prompt": "2+3?"})
        assert short["cut"] == 0.0 and failure.kind == "too_long" and "of 48 at most" in failure.detail
        cut = RewardModel(str(folder), max_tokens=48, long_texts="cut")
        kept, scored = cut(["5", long], **{**ROW, "prompt": "2+3?"})
        assert kept == pytest.approx(short, abs=1e-5) and scored["cut"] == 1.0
    # What is left of a chat is its end.
    ids = cut_ids = None
    model = RewardModel(str(qwen), max_tokens=48, long_texts="cut")
    cut_ids, was_cut = model._encode(long, "2+3?", None, {})
    ids = chat_ids(qwen, "2+3?", long)
    assert was_cut and cut_ids["input_ids"] == ids[-48:]


def chat_ids(folder, prompt, response):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(messages, return_dict=True)["input_ids"]


def test_a_score_that_is_no_number_is_a_failure_of_its_response_alone(qwen, tmp_path):
    """The embedding of one token is NaN; only texts with it are affected."""
    import torch

    (loaded,) = load_functions(RewardConfig(function="reward_model", args={"path": str(qwen)}))
    model = loaded.target
    token = model._tokenizer.encode("!", add_special_tokens=False)[0]
    with torch.no_grad():
        model._model.get_input_embeddings().weight[token] = float("nan")
    outcomes = loaded.score(Question(PROMPT, "5", {}), [Response(r, "stop") for r in RESPONSES])
    assert [o.failure for o in outcomes] == [None] * 5 + ["not_finite: the model's score is nan"]
    assert all(o.reward is not None for o in outcomes[:5])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"path": "/no/such/folder"}, "reward model: path: got '/no/such/folder .nothing there.'"),
        ({"score": "probability"}, "reward model: score: got 'probability'; expected one of logit"),
        ({"score": "softmax"}, "reward model: score: .*several labels"),
        ({"long_texts": "drop"}, "reward model: long_texts"),
        ({"dtype": "int8"}, "reward model: dtype"),
        ({"device": "gpu"}, "reward model: device: got 'gpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "reward model: device"),
        ({"batch_size": 0}, "reward model: batch_size"),
        ({"max_tokens": 10**6}, "reward model: max_tokens: .*<= 512"),
        ({"template": "no response"}, "reward model: template: .*{response} in it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_work(qwen, settings, why):
    with pytest.raises((ConfigError, ModelError), match=why):
        RewardModel(**{"path": str(qwen), **settings})


def test_rlpost_check_loads_the_model_and_downloads_none(qwen, monkeypatch):
    cfg = load_config(["recipe=math/arithmetic"])
    cfg.reward.function, cfg.reward.args = "reward_model", {"path": str(qwen)}
    assert "reward_model, a group at a time, in 1 worker process, at most 30 s per call" in str(check(cfg))
    cfg.reward.args = {"path": str(qwen), "score": "probability"}
    with pytest.raises(ConfigError, match="reward model: score"):
        check(cfg)
    cfg.reward.args = {"path": "/no/such/folder"}
    with pytest.raises(ModelError, match="reward model: path"):
        check(cfg)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    cfg.reward.args = {"path": "nobody/no-such-model-here"}
    assert "reward: model nobody/no-such-model-here is not in the local cache" in str(check(cfg))


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    from tests.tiny_models import write_model

    folder = write_model(tmp_path / "policy", weights=True)
    with pytest.raises(ModelError, match="reward model: path: got 'no weights for score.weight'"):
        RewardModel(str(folder))


def test_a_model_without_a_padding_token(tmp_path):
    """The tokenizer's own is taken; where that is the end token, which ends texts, nothing may be padded."""
    folder = write_classifier(tmp_path / "model", pad_token_id=None)
    expected = direct(folder, [chat(r) for r in RESPONSES])
    np.testing.assert_allclose(rewards(RewardModel(str(folder))), expected, atol=1e-5)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(ConfigError, match="reward model: batch_size: got 8; expected 1 .*set pad_token_id"):
        RewardModel(str(folder))
    np.testing.assert_allclose(rewards(RewardModel(str(folder), batch_size=1)), expected, atol=1e-5)


def test_other_weights_are_another_version(qwen, tmp_path):
    other = write_classifier(tmp_path / "other", seed=1)
    assert fingerprint(qwen) != fingerprint(other)
    assert fingerprint(qwen) in RewardModel(str(qwen)).version
    args = {"path": str(other)}
    before = load_functions(RewardConfig(function="reward_model", args=args))[0].facts.version
    write_classifier(other, seed=2)
    assert load_functions(RewardConfig(function="reward_model", args=args))[0].facts.version != before


def test_in_a_worker_a_group_at_a_time(qwen):
    cfg = RewardConfig(function="reward_model", args={"path": str(qwen), "threads": 1})
    assert choose_num_workers(cfg) == 1, "each worker would load the model"
    workers = RewardWorkers(cfg)
    try:
        workers.wait_ready()
        scorer = RewardScorer(workers, lambda parts: RESPONSES[int(parts[0][0])], group_size=len(RESPONSES))
        prompt = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text=PROMPT)
        for index in range(len(RESPONSES)):
            scorer.submit(prompt, index, [np.array([index])], "stop")
        assert scorer.drain(60)
        results = sorted(scorer.poll(), key=lambda one: one.index)
        assert scorer.take_counts().calls == 1
    finally:
        workers.close()
    np.testing.assert_allclose([one.reward for one in results], direct(qwen, [chat(r) for r in RESPONSES]), atol=1e-5)
    assert results[0].parts == {"cut": 0.0}
