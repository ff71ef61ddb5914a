"""What exists before any engine does: stop tokens, contexts, prompts and the reward, from a configuration."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from rlpost import session
from rlpost.config.compose import load_config
from rlpost.errors import ConfigError
from rlpost.models.files import find_stop_tokens
from rlpost.session import open_session

RECIPE = ["recipe=math/arithmetic", "data.train.generator.count=20", "eval.max_prompts=5", "device=cpu"]


@pytest.fixture
def opened(monkeypatch):
    """Opens a session without touching this process's environment."""
    monkeypatch.setattr(session, "write_environment", lambda **_: None)
    return lambda *overrides, **options: open_session(load_config([*RECIPE, *overrides]), **options)


def test_the_parts_of_the_demo(opened):
    made = opened("rollout.temperature=0.7", "rollout.max_response_tokens=100", "eval.max_response_tokens=120")
    assert len(made.train_sets[0].prompts) == 20 and made.vocab_size == 18
    assert [p.uid for p in made.eval_prompts] == [f"eval:{n}" for n in range(5)]
    assert (made.sampling.temperature, made.sampling.stop_token_ids) == (0.7, (16,))
    assert made.eval_response_tokens == 120
    longest = max(len(p.token_ids) for p in (*made.train_sets[0].prompts, *made.eval_prompts))
    assert made.max_model_len == longest + 120, "room for the longest prompt and the longest response of either kind"


def test_only_what_the_command_needs_is_loaded(opened):
    assert opened("eval.every=-1").eval_prompts == ()
    evaluated = opened("eval.every=-1", train=False)
    assert len(evaluated.eval_prompts) == 5 and evaluated.train_sets == ()


def test_a_context_without_room_for_a_prompt(opened):
    with pytest.raises(ConfigError, match="context: got '100 tokens for 100 of response'"):
        opened("model.max_context_tokens=100", "rollout.max_response_tokens=100")


def judge(made, text):
    ids = made.tokenizer.encode(text)
    made.scorer.submit(made.eval_prompts[0], 0, [np.array([*ids, 16], np.int32)], "stop")
    (verdict,) = made.scorer.poll()
    return verdict


def test_the_reward_gets_its_arguments_and_text_without_the_end_token(opened):
    answer = opened().eval_prompts[0].reference
    assert judge(opened(), f"1+1=2#{answer}").reward == 1.0
    assert judge(opened("reward.args={marker: '='}"), f"#{answer}").reward == 0.0
    assert judge(opened("reward.args={marker: '='}"), f"={answer}").reward == 1.0
    spec = "reward.function={_target_: rlpost.rewards.library.answers.exact_answer, marker: '+'}"
    assert judge(opened(spec, "reward.args={marker: '='}"), f"={answer}").reward == 1.0, "args win over the target's"


def test_a_reward_that_is_not_there(opened):
    with pytest.raises(ConfigError, match="reward.function"):
        opened("reward.function=rlpost.rewards.library.answers.read_nothing")


def test_a_chat_template_of_the_runs_own_goes_with_the_tokenizer(opened, tmp_path):
    """What is saved beside the model's weights prompts as the run does."""
    from rlpost.config import DataConfig
    from rlpost.prompts.chat_template import read_chat_template

    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}{% if again %}={% endif %}")
    keys = [f"data.chat_template={tmp_path / 'mine.jinja'}", "data.chat_template_kwargs.again=true", "data.prefill=1"]
    made, plain = opened(*keys), opened()
    assert made.tokenizer.decode(made.train_sets[0].prompts[0].token_ids).endswith("?=1")
    assert made.tokenizer.decode(made.eval_prompts[0].token_ids).endswith("?=1")
    made.tokenizer.save_pretrained(str(tmp_path / "saved"))
    saved = read_chat_template(tmp_path / "saved", DataConfig(chat_template_kwargs={"again": True}))
    assert saved is not None and saved.source == (tmp_path / "mine.jinja").read_text()
    assert plain.tokenizer.chat_template is None


def test_reward_workers_start_before_anything_heavy_is_imported():
    """And session.close() ends them; a function of theirs would be in the way of a GPU otherwise."""
    code = f"""
import sys
from rlpost import session
from rlpost.config.compose import load_config
real = session.RewardWorkers
def start(*arguments, **options):
    print([name for name in ("torch", "transformers", "datasets", "vllm") if name in sys.modules])
    return real(*arguments, **options)
session.RewardWorkers = start
import rlpost.loop
policy = ["reward.workers=1", "reward.on_failure=retry", "reward.retries=5"]
opened = session.open_session(load_config([*{RECIPE!r}, *policy]))
print("transformers" in sys.modules, opened.scorer._retries, opened.scorer._group_size, opened.eval_scorer._group_size)
opened.close()
opened.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "True 5 8 4"], done.stderr


def test_a_reward_that_fails_to_load_leaves_no_worker(opened, tmp_path, monkeypatch):
    (tmp_path / "late_rewards.py").write_text("def needy(completions, nothing):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="got 'nothing'; expected names that data.train has as columns"):
        opened("reward.function=late_rewards.needy", "reward.workers=1")
    assert not [t for t in threading.enumerate() if t.name == "reward-workers"]


def test_the_cache_is_for_workers_and_stands_where_it_is_said(opened, tmp_path):
    trivial = opened()
    trivial.open_result_cache(tmp_path, print)
    assert trivial.scorer.cache is None and not list(tmp_path.iterdir())
    for overrides, folder in (
        ([], "run"),
        ([f"reward.cache_dir={tmp_path}/mine"], "mine"),
        (["reward.cache=false"], ""),
    ):
        made = opened("reward.workers=1", *overrides)
        made.open_result_cache(tmp_path / "run", print)
        assert made.scorer.cache is made.eval_scorer.cache
        assert (made.scorer.cache is not None) == bool(folder)
        assert not folder or (tmp_path / folder / "verdicts.sqlite").exists()
        made.close()


def stop_tokens(tmp_path, eos, generation, extra=()):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    cfg = load_config([*RECIPE, f"rollout.stop_token_ids={list(extra)}"])
    return find_stop_tokens(cfg, SimpleNamespace(eos_token_id=eos), tmp_path)


@pytest.mark.parametrize(
    ("eos", "generation", "extra", "expected"),
    [
        (5, None, (), (5,)),
        (5, 3, (), (3, 5)),
        (5, [5, 9], (2,), (2, 5, 9)),
        (None, None, (7,), (7,)),
        (0, None, (), (0,)),
    ],
)
def test_stop_tokens_come_from_three_places(tmp_path, eos, generation, extra, expected):
    assert stop_tokens(tmp_path, eos, generation, extra) == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, [0, 2], (0, 2, 5)),  # no generation_config.json: config.json names them
        ({}, 2, (2, 5)),  # one that names none
        ({"eos_token_id": 3}, [0, 2], (3, 5)),  # else it counts alone, as with transformers
        (None, None, (5,)),
    ],
)
def test_end_tokens_of_config_json(tmp_path, generation, config, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config, "vocab_size": 10}))
    assert stop_tokens(tmp_path, 5, None) == expected


def test_a_model_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stop tokens.*rollout.stop_token_ids"):
        stop_tokens(tmp_path, None, None)
