"""Every signature a reward function may have is called with what it takes; what it returns is read as it was meant."""

import asyncio
import sys
from functools import partial

import pytest

from rlpost.config import RewardConfig
from rlpost.errors import ConfigError
from rlpost.rewards.functions import LoadedFunction, Question, Response, check_columns, load_functions
from rlpost.rewards.selection import FunctionSpec, list_functions, runs_in_process

QUESTION = Question(prompt="1+1?", reference="2", columns={"level": 3, "task": "sums"})
TWO = [Response(text="2", finish_reason="stop", token_ids=(7, 8)), Response(text="", finish_reason="length")]


def load(function, *, reference_key="answer", messages=False, **spec):
    return LoadedFunction(FunctionSpec(function=function, **spec), RewardConfig(messages=messages), reference_key)


def judge(function, responses=TWO, **settings):
    loaded = load(function, **settings)
    return loaded.score(QUESTION, responses if loaded.facts.per_group else responses[:1])


def rewards(outcomes):
    return [outcome.reward for outcome in outcomes]


# ---- ours ----------------------------------------------------------------------------------------------------------


def test_a_function_of_one_response_gets_the_keywords_it_takes():
    seen = []

    def everything(response, **rest):
        seen.append((response, rest))
        return 1.0

    def some(response, *, reference, columns):
        seen.append((response, reference, columns["level"]))
        return 1

    def one(response):
        return True

    assert [rewards(judge(f)) for f in (everything, some, one)] == [[1.0], [1.0], [1.0]]
    keywords = {"prompt": "1+1?", "reference": "2", "finish_reason": "stop", "columns": {"level": 3, "task": "sums"}}
    assert seen == [("2", keywords), ("2", "2", 3)]


def test_a_function_of_a_group_gets_all_responses_and_answers_for_each():
    def shortest(responses, *, prompt, reference, finish_reasons):
        assert (responses, prompt, reference, finish_reasons) == (["2", ""], "1+1?", "2", ["stop", "length"])
        return [{"reward": 1.0, "short": 0.5}, None]

    assert load(shortest).facts.per_group
    first, second = judge(shortest)
    assert (first.reward, first.parts) == (1.0, {"short": 0.5})
    assert second.reward is None and second.failure is None, "no opinion"


@pytest.mark.parametrize("returned", [[1.0], 1.0, "ab", None, {"a": 1, "b": 2}])
def test_a_group_function_that_does_not_answer_for_each_is_a_failure(returned):
    outcomes = judge(lambda responses: returned)
    assert len(outcomes) == 2
    assert all(o.failure.startswith("reward_error: ValueError: a reward function of a group") for o in outcomes)


def test_one_bad_value_in_a_group_is_one_failure():
    good, bad = judge(lambda responses: [0.5, "x"])
    assert good.reward == 0.5 and bad.failure.startswith("reward_error: ValueError")


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    assert rewards(judge(lambda response: np.float32(0.5))) == [0.5]
    assert rewards(judge(lambda response: np.bool_(True))) == [1.0]
    assert rewards(judge(lambda responses: np.array([1, 0]))) == [1.0, 0.0]


def test_async_functions_and_callable_objects():
    async def later(response, *, reference):
        await asyncio.sleep(0)
        return float(response == reference)

    class Judge:
        timeout_s, concurrency, version, cacheable = 7.0, 3, "2", False

        async def __call__(self, responses):
            return [float(len(r)) for r in responses]

    assert rewards(judge(later)) == [1.0] and rewards(judge(Judge())) == [1.0, 0.0]
    facts = load(Judge()).facts
    assert (facts.timeout_s, facts.concurrency, facts.cacheable, facts.per_group) == (7.0, 3, False, True)
    assert (
        load(later).facts.concurrency == RewardConfig().concurrency
        and load(lambda response: 1.0).facts.concurrency == 1
    )


def test_a_decorated_async_function_is_waited_for():
    def decorated(function):
        return lambda response: function(response)

    async def later(response):
        await asyncio.sleep(0)
        return 3.0

    assert rewards(judge(decorated(later))) == [3.0]


def test_an_async_function_has_a_deadline_also_in_the_process():
    async def never(response):
        await asyncio.sleep(600)

    never.timeout_s = 0.05
    assert judge(never)[0].failure == "timeout: no result within 0.05 s"

    async def its_own(response):
        raise TimeoutError("the database")

    assert judge(its_own)[0].failure == "reward_error: TimeoutError: the database"


def test_an_async_close_runs_where_the_calls_ran():
    class Client:
        async def __call__(self, response):
            self.loop = asyncio.get_running_loop()
            return 1.0

        async def close(self):
            self.closed_in = asyncio.get_running_loop()

    client = Client()
    loaded = LoadedFunction(FunctionSpec(function=client), RewardConfig())
    loaded.score(QUESTION, TWO[:1])
    loaded.score(QUESTION, TWO[:1])
    loaded.close()
    assert client.closed_in is client.loop


# ---- TRL's ---------------------------------------------------------------------------------------------------------


def test_trls_signature():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [1.0, None]

    first, second = judge(reward)
    assert first.reward == 1.0 and second.reward is None and second.failure is None
    assert seen == {
        "prompts": ["1+1?", "1+1?"],
        "completions": ["2", ""],
        "completion_ids": [[7, 8], []],
        "columns": {"level": [3, 3], "task": ["sums", "sums"], "answer": ["2", "2"]},
    }


def test_trls_functions_take_what_they_name():
    assert rewards(judge(lambda completions, answer: [float(c == a) for c, a in zip(completions, answer, strict=True)]))
    assert not load(lambda completions, answer: []).facts.takes_tokens
    assert load(lambda completions, completion_ids: []).facts.takes_tokens
    assert load(lambda completions, **kwargs: []).facts.takes_tokens


def test_an_argument_of_the_recipe_goes_before_a_column_of_its_name():
    def reward(completions, level, **_):
        return [float(level)] * len(completions)

    assert rewards(judge(partial(reward, level=7))) == [7.0, 7.0]


def test_trls_conversational_data():
    def reward(prompts, completions, **_):
        assert prompts[0] == [{"role": "user", "content": "1+1?"}]
        return [float(completion[0]["content"] == "2") for completion in completions]

    assert rewards(judge(reward, messages=True)) == [1.0, 0.0]


def test_nan_is_no_opinion_in_trls_style_and_a_failure_in_ours():
    assert judge(lambda completions: [float("nan"), 1.0])[0].failure is None
    assert judge(lambda responses: [float("nan"), 1.0])[0].failure.startswith("reward_error: ValueError")


def test_an_async_function_in_trls_style():
    async def reward(completions, **_):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    assert rewards(judge(reward)) == [1.0, 0.0]


# ---- which style ---------------------------------------------------------------------------------------------------


def test_the_style_is_told_by_the_parameters_names_or_by_the_config():
    def trl(completions, **_):
        return [1.0 for _ in completions]

    def ours(response, **_):
        return 1.0

    def hidden(**kwargs):
        return [1.0] * len(kwargs["completions"])

    assert load(trl).trl and not load(ours).trl
    with pytest.raises(ConfigError, match="style: trl"):
        load(hidden)
    assert load(hidden, style="trl").trl and rewards(judge(hidden, style="trl")) == [1.0, 1.0]
    assert load(trl).facts.per_group and not load(trl, calls="sample").facts.per_group
    assert rewards(judge(trl, calls="sample")) == [1.0]


def test_calls_that_contradict_the_parameters_are_refused():
    with pytest.raises(ConfigError, match="reward.calls.*responses"):
        load(lambda response: 1.0, calls="group")
    with pytest.raises(ConfigError, match="reward.calls"):
        load(lambda responses: [1.0], calls="sample")


def test_a_function_that_cannot_be_called_is_refused_when_it_is_loaded():
    for wrong in (lambda: 1.0, lambda response, *, answer: 1.0, lambda responses, *, finish_reason: [1.0]):
        with pytest.raises(ConfigError, match=r"a function of \(response"):
            load(wrong)
    load(lambda response, *, answer=None: 1.0)
    load(max)


def test_columns_that_a_function_in_trls_style_needs():
    facts = [load(lambda completions, answer, level, other=None, **_: []).facts]
    assert facts[0].columns == ("answer", "level")
    check_columns(facts, ["level", "answer", "task"], "data.train")
    with pytest.raises(ConfigError, match=r"got 'level'; expected names that data.eval has as columns \(answer\)"):
        check_columns(facts, ["answer"], "data.eval")


# ---- which functions -----------------------------------------------------------------------------------------------

TWO_FUNCTIONS = {
    "right": {"function": "gsm8k", "weight": 2, "args": {"format_reward": 0.5}},
    "form": {"function": "format_match", "args": {"pattern": "#.*"}},
}


def test_several_functions_with_weights_and_arguments():
    cfg = RewardConfig(function=None, functions=TWO_FUNCTIONS)
    right, form = load_functions(cfg)
    assert (right.facts.name, right.facts.weight, form.facts.weight) == ("right", 2.0, 1.0)
    question = Question(prompt="", reference="#### 5", columns={})
    response = [Response(text="#### 5", finish_reason="stop")]
    assert rewards(right.score(question, response)) == [1.5] and rewards(form.score(question, response)) == [1.0]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"functions": TWO_FUNCTIONS}, "got 'both'"),
        ({"function": None}, "got 'neither'"),
        ({"function": None, "functions": TWO_FUNCTIONS, "args": {"a": 1}}, "reward.args.*each function"),
        ({"function": None, "functions": TWO_FUNCTIONS, "style": "trl"}, "reward.style.*each function"),
        ({"function": None, "functions": {"a": "gsm8k"}}, "reward.functions.a.*a mapping"),
        ({"function": None, "functions": {"a": {"weight": 1}}}, "reward.functions.a.*a mapping with function"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "wieght": 1}}}, "wieght.*only function, weight"),
        ({"function": None, "functions": {"a b": {"function": "gsm8k"}}}, "a name of letters"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "weight": float("nan")}}}, "a finite number"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "style": "tlr"}}}, "one of auto, rlpost, trl"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "style": None}}}, "one of auto, rlpost, trl"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "calls": "all"}}}, "one of auto, sample, group"),
        ({"function": None, "functions": {"a": {"function": "gsm8k", "args": 3}}}, "a mapping of keyword arguments"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        list_functions(RewardConfig(**settings))


def test_trivial_rewards_run_in_the_process_and_others_in_workers():
    assert runs_in_process(RewardConfig(function="gsm8k"))
    assert runs_in_process(
        RewardConfig(function={"_target_": "rlpost.rewards.library.answers.exact_answer", "marker": "="})
    )
    assert runs_in_process(RewardConfig(function=lambda response: 1.0)), "a Python object cannot travel"
    assert runs_in_process(RewardConfig(function=None, functions=TWO_FUNCTIONS))
    assert runs_in_process(RewardConfig(function="math", workers=0))
    for cfg in (
        RewardConfig(function="math"),
        RewardConfig(function="their.own.reward"),
        RewardConfig(function="gsm8k", workers=2),
        RewardConfig(function=None, functions={**TWO_FUNCTIONS, "mine": {"function": "their.own.reward"}}),
    ):
        assert not runs_in_process(cfg)


# ---- versions ------------------------------------------------------------------------------------------------------


def test_the_version_follows_source_arguments_and_the_functions_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def version(source="def f(response, **_):\n    return 1.0\n", args=None, **settings):
        (tmp_path / "versioned.py").write_text(source)
        sys.modules.pop("versioned", None)
        cfg = RewardConfig(function="versioned.f", args=args or {}, **settings)
        (loaded,) = load_functions(cfg, "answer")
        return loaded.facts.version

    same = version()
    assert version() == same and version(timeout_s=5.0, workers=3) == same
    changed = [
        version("def f(response, **_):\n    return 2.0\n"),
        version("def f(response, **_):\n    return 1.0\nf.version = 'b'\n"),
        version(args={"a": 1}),
        version(messages=True),
    ]
    assert len({same, *changed}) == 5
