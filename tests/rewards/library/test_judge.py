"""The judge against a real chat endpoint on this machine that fails in the ways an endpoint can."""

from __future__ import annotations

import json
import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.config import RewardConfig
from rlpost.config.compose import load_config
from rlpost.errors import ConfigError
from rlpost.preflight.checks import check
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.functions import LoadedFunction, Question, Response, check_columns, load_functions
from rlpost.rewards.library.budget import FILE_NAME, Budget
from rlpost.rewards.library.judge import Reply, ScoreReader
from rlpost.rewards.library.text_template import TextTemplate
from rlpost.rewards.result_cache import RewardResultCache
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.selection import FunctionSpec
from rlpost.rewards.worker_pool import InlineCalls, RewardWorkers
from rlpost.types import Prompt
from tests.rewards.library.chat_endpoint import Endpoint

QUESTION = Question(prompt="1+1?", reference="2", columns={"level": 3, "tags": ["easy"]})
RUBRIC = "Question: {prompt}\nReference: {reference}\nAnswer: {response}\nGive a score from 0 to 10."


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def judge(endpoint):
    """The outcome of one response."""
    loaded = []

    def run(*script, text="2", folder=None, **settings):
        endpoint.script = list(script)
        fixed = {"url": endpoint.url, "model": "tiny", "backoff_s": 0.01, "attempt_timeout_s": 5.0}
        if "rubric_file" not in settings:
            fixed["rubric"] = RUBRIC
        loaded.append(
            LoadedFunction(FunctionSpec(function="judge", args=fixed | settings), RewardConfig(), None, folder)
        )
        (outcome,) = loaded[-1].score(QUESTION, [Response(text=text, finish_reason="stop")])
        return outcome

    yield run
    for function in loaded:
        function.close()


def test_the_request_is_the_rubric_and_the_score_becomes_a_share(judge, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    outcome = judge("A fine answer.\nScore: 8", system="Be strict.", api_key_env="JUDGE_KEY", request={"seed": 7})
    assert (outcome.reward, outcome.parts) == (0.8, {"raw_score": 8.0})
    (body,) = endpoint.requests
    rubric = "Question: 1+1?\nReference: 2\nAnswer: 2\nGive a score from 0 to 10."
    assert body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be strict."}, {"role": "user", "content": rubric}],
        "temperature": 0.0,
        "max_tokens": 1024,
        "seed": 7,
    }
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert judge("Score: 3", low=1, high=5, normalize=False).reward == 3.0
    assert judge("Score: 3", low=1, high=5).reward == 0.5


def test_a_rubric_in_a_file_and_columns(judge, endpoint, tmp_path):
    file = tmp_path / "rubric.txt"
    file.write_text("{level} {{braces}} {response}")
    judge(rubric_file=str(file), text="{prompt}")
    assert endpoint.requests[-1]["messages"][0]["content"] == "3 {braces} {prompt}"
    for rubric, why in (("{tags} {response}", "a list in braces"), ("{meta.unit} {response}", "KeyError")):
        outcome = judge(rubric=rubric)
        assert outcome.failure.startswith("bad_column: ") and why in outcome.failure, outcome
    assert len(endpoint.requests) == 1, "nothing is asked for a row without the column"


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 500},
        {"status": 503},
        {"body": "<html>try later</html>"},
        {"body": '{"error": "overloaded"}'},
        {"body": '{"choices": []}'},
        {"body": '{"choices": [{"message": {"content": 8}}]}'},
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(judge, endpoint, trouble):
    assert judge(trouble, trouble, "Score: 8").reward == 0.8
    assert len(endpoint.requests) == 3


def test_a_slow_endpoint(judge, endpoint):
    assert judge({"wait_s": 30}, "Score: 8", attempt_timeout_s=0.5).reward == 0.8
    outcome = judge({"wait_s": 30}, attempt_timeout_s=0.5, retries=0)
    assert outcome.failure == "http_error: no response within 0.5 s (1 attempts)"


def test_trouble_that_stays_is_a_failure(judge, endpoint):
    assert judge({"status": 500}, {"status": 500}, retries=1).failure == "http_error: status 500 (2 attempts)"
    refused = judge({"status": 400, "body": '{"error": "too long for the model"}'})
    assert refused.failure.startswith("http_error: status 400: ") and "too long for the model" in refused.failure
    assert "no chat completion" in judge({"body": "null"}, retries=0).failure


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("I cannot tell.", "bad_score: no number"),
        ("", "bad_score: no number"),
        (None, "bad_score: no number"),
        ("Score: 11", "score_out_of_range: 11, not from 0 to 10"),
        ("Score: -1", "score_out_of_range: -1"),
        ({"text": "There are 3 points to", "finish_reason": "length"}, "bad_score: the reply was cut off"),
        ("<think>It may be a 9", "bad_score: no number"),
    ],
    ids=str,
)
def test_what_is_no_score_is_a_failure_and_not_a_zero(judge, endpoint, reply, failure):
    outcome = judge(reply)
    assert outcome.reward is None and outcome.failure.startswith(failure), outcome
    assert len(endpoint.requests) == 1, "asking again would give the same"


def reader(**settings) -> ScoreReader:
    return ScoreReader("judge", **{"pattern": None, "field": None, "low": 0, "high": 10, **settings})


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("7 for style, 9 for content: 8", {}, 8),
        ("**Score:** 8.5.", {}, 8.5),
        ("Score: 8/10", {}, 8),
        ("Rating: [[8]]/10", {}, 8),
        ("I give it 8 points out of 10.", {}, 8),
        (r"\boxed{8}/10", {}, 8),
        ("(8)/10", {}, 8),
        ("`8`/10", {}, 8),
        ("8 (out of 10)", {}, 8),
        ("8 out of the 10", {}, 8),
        ("8 of 10", {}, 8),
        ("A rating of 10.", {}, 10),
        ("Three of them are wrong: a score of 10", {}, 10),
        ("Score: /10", {}, "bad_score"),
        ("4.5 stars out of 5", {"high": 5}, 4.5),
        ("[[8]]/10", {"pattern": r"\[\[\S+"}, 8),
        ("8 out of 10", {}, 8),
        ("**8**/10", {}, 8),
        ("8 / 10.0 points", {}, 8),
        ("Score: 8/100", {}, "bad_score"),
        ("Score: 4/5", {}, "bad_score"),
        ("80%", {}, "bad_score"),
        ("80%", {"high": 100}, 80),
        ("3/4", {"high": 1}, 0.75),
        ("0.7", {"high": 1}, 0.7),
        ("<think>2</think>8", {}, 8),
        ("Score: 8 (on a scale to 10)", {"pattern": r"Score:\s*(.*?)\s*\("}, 8),
        ("Score: 3. No. Score: 6/10", {"pattern": r"Score: (\S+)"}, 6),
        ("Score: good", {"pattern": r"Score: (\S+)"}, "bad_score"),
        ("8", {"pattern": r"Score: (\d)"}, "bad_score"),
        ('{"score": 4} then {"score": 7, "why": "{"}', {"field": "score"}, 7),
        ('```json\n{"verdict": {"score": "8/10"}}\n```', {"field": "verdict.score"}, 8),
        ('{"score": true}', {"field": "score"}, "bad_score"),
        ('{"score": null}', {"field": "score"}, "bad_score"),
        ('{"points": 8}', {"field": "score"}, "bad_score"),
        ('{"score": NaN}', {"field": "score"}, "score_out_of_range"),
        ("8", {"field": "score"}, "bad_score"),
        ("1e999", {}, "score_out_of_range"),
        ('{"score": 1e999}', {"field": "score"}, "score_out_of_range"),
        (f'{{"score": 1{"0" * 400}}}', {"field": "score"}, "bad_score"),
        ('{"score": 8', {"field": "score"}, "bad_score"),
        ("{" * 5000, {"field": "score"}, "bad_score"),
        ('{"a":' * 5000, {"field": "score"}, "bad_score"),
    ],
)
def test_how_scores_are_read(text, settings, expected):
    reply = Reply(text, "stop", None)
    if isinstance(expected, str):
        with pytest.raises(RewardFailure) as raised:
            reader(**settings).read(reply)
        assert raised.value.kind == expected
    else:
        assert reader(**settings).read(reply) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    text=st.text(max_size=60) | st.from_regex(r"(Score: )?[-0-9./% ]{0,12}(10|/10)?") | json_values.map(json.dumps),
    field=st.none() | st.sampled_from(["score", "a.b", ""]),
    reason=st.sampled_from(["stop", "length", None]),
)
def test_any_reply_is_a_score_on_the_scale_or_a_named_failure(text, field, reason):
    for settings in ({"field": field or None}, {"pattern": r"(?:Score: )?(.+)"}):
        try:
            score = reader(**settings).read(Reply(text, reason, None))
        except RewardFailure as failure:
            assert failure.kind in ("bad_score", "score_out_of_range")
        else:
            assert 0 <= score <= 10


@given(value=json_values, rubric=st.sampled_from(["{c} {response}", "{c.x} {response}", "{c[0]:>9} {response}"]))
def test_any_column_is_text_in_the_rubric_or_a_named_failure(value, rubric):
    template = TextTemplate(rubric, "rubric")
    try:
        text = template.fill("R", prompt="P", reference=None, columns={"c": value})
    except RewardFailure as failure:
        assert failure.kind == "bad_column"
    else:
        assert text.endswith(" R") and "None" not in text.replace(str(value), "")


def test_a_reply_cut_off_counts_where_the_pattern_is_found(judge):
    cut = {"text": "Score: 8. Because", "finish_reason": "length"}
    assert judge(cut, pattern=r"Score: (\d+)").reward == 0.8


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"url": None}, "reward judge: url"),
        ({"url": "localhost:8000"}, "reward judge: url: got 'localhost"),
        ({"model": ""}, "reward judge: model"),
        ({"url": "http://a/v1/chat/completions/"}, "reward judge: url: .*leave /chat/completions out"),
        ({"request": ["n"]}, "reward judge: request: got .*a mapping"),
        ({"system": 5}, "reward judge: system"),
        ({"rubric": None}, "reward judge: rubric: got 'neither'; expected rubric or rubric_file; give one"),
        ({"rubric_file": "x"}, "reward judge: rubric: got 'both'"),
        ({"rubric": None, "rubric_file": "/no/such/file"}, "reward judge: rubric_file: got '/no/such/file'.*No such"),
        ({"rubric": "Rate {prompt}."}, "reward judge: rubric: .*{response} in it"),
        ({"rubric": "{response} {"}, "reward judge: rubric: .*double other braces"),
        ({"rubric": '{response} as {"score": 1}'}, "reward judge: rubric: .*double other braces"),
        ({"rubric": "{response} {}"}, "reward judge: rubric: .*names of columns"),
        ({"rubric": "{response!r}"}, "reward judge: rubric: .*without !"),
        ({"pattern": "("}, "reward judge: pattern"),
        ({"pattern": "x", "field": "score"}, "reward judge: pattern"),
        ({"field": ""}, "reward judge: field"),
        ({"low": 5, "high": 5}, "reward judge: low, high"),
        ({"high": "ten"}, "reward judge: low, high"),
        ({"temperature": -1}, "reward judge: temperature"),
        ({"max_tokens": 0}, "reward judge: max_tokens"),
        ({"request": {"messages": []}}, "reward judge: request: got 'messages'"),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "reward judge: api_key_env: got 'NO_SUCH_VARIABLE_HERE'"),
        ({"retries": -1}, "reward judge: retries"),
        ({"concurrency": 0}, "reward judge: concurrency"),
        ({"budget_requests": 0}, "reward judge: budget_requests"),
        ({"budget_tokens": 1.5}, "reward judge: budget_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_settings_that_cannot_work(settings, why):
    args = {"url": "http://127.0.0.1:9/v1", "model": "tiny", "rubric": RUBRIC, **settings}
    with pytest.raises(ConfigError, match=why):
        LoadedFunction(FunctionSpec(function="judge", args=args), RewardConfig())


def test_the_key_itself_is_no_setting():
    with pytest.raises(ConfigError, match="api_key"):
        args = {"url": "http://a", "model": "tiny", "rubric": RUBRIC, "api_key": "secret"}
        LoadedFunction(FunctionSpec(function="judge", args=args), RewardConfig())


def facts_of(rubric: str, reference_key: str | None = "answer"):
    args = {"url": "http://a", "model": "tiny", "rubric": rubric}
    return load_functions(RewardConfig(function="judge", args=args), reference_key)[0].facts


def test_check_knows_the_columns_and_the_reference_of_a_rubric():
    facts = facts_of("{prompt} {level} {meta.unit} {response}")
    assert facts.columns == ("level",) and not facts.needs_reference
    assert facts_of("{reference} {response}").needs_reference
    check_columns([facts], ["level"], "data.train")
    with pytest.raises(ConfigError, match="reward.function: got 'level'; expected names that data.train has"):
        check_columns([facts], ["difficulty"], "data.train")
    with pytest.raises(ConfigError, match="column: got 'answer'; .*name it reference"):
        facts_of("{answer} {response}")


def test_a_rubric_that_changes_is_another_function(tmp_path):
    file = tmp_path / "rubric.txt"
    versions = set()
    for text in ("{response}", "{response}!"):
        file.write_text(text)
        args = {"url": "http://a", "model": "tiny", "rubric_file": str(file)}
        versions.add(load_functions(RewardConfig(function="judge", args=args))[0].facts.version)
    assert len(versions) == 2


def test_a_higher_budget_does_not_pay_again_for_what_is_cached():
    def version_of(**more):
        args = {"url": "http://a", "model": "tiny", "rubric": "{response}", **more}
        return load_functions(RewardConfig(function="judge", args=args))[0].facts.version

    assert version_of(budget_requests=1, retries=0) == version_of(budget_requests=9, retries=5) == version_of()
    assert len({version_of(), version_of(high=5), version_of(temperature=1), version_of(version="2")}) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"url": None}, "missing a required argument: 'url'"),
        ({"rubric": "Rate it."}, "reward judge: rubric: .*{response} in it"),
        (
            {"rubric": "{level}: {response}"},
            "reward.function: got 'level'; expected names that data.train has as columns",
        ),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "reward judge: api_key_env"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rlpost_check_finds_the_mistake(changes, why):
    given = {"_target_": "judge", "url": "http://127.0.0.1:9/v1", "model": "tiny", "rubric": RUBRIC} | changes
    cfg = load_config(["recipe=math/arithmetic"])
    cfg.reward.function = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(ConfigError, match=why):
        check(cfg)


def spent(folder) -> tuple[int, int]:
    with sqlite3.connect(folder / FILE_NAME) as database:
        ((requests, tokens),) = database.execute("SELECT requests, tokens FROM spent")
    return requests, tokens


def test_requests_of_a_budget_are_counted_with_their_retries_and_over_restarts(judge, endpoint, tmp_path):
    settings = {"budget_requests": 3, "folder": tmp_path / "run"}
    assert judge({"status": 500}, "Score: 8", **settings).reward == 0.8
    assert judge("Score: 9", **settings).reward == 0.9, "as by the process of a resumed run"
    refused = judge("Score: 9", **settings)
    assert refused.reward is None and refused.failure == "budget: 3 of 3 requests are spent"
    assert len(endpoint.requests) == 3 and spent(tmp_path / "run") == (3, 0)
    assert judge("Score: 9", budget_requests=3, folder=tmp_path / "other").reward == 0.9


def test_the_last_request_of_a_budget_is_taken_once(tmp_path):
    """Another worker is taking it: this one waits for that, and does not go by what it read before."""
    budget = Budget("judge", "tiny", requests=2, tokens=None)
    budget.use_folder(tmp_path)
    budget.take_request()
    budget.close()
    outcomes: list[object] = []

    def take() -> None:
        try:
            budget.take_request()
            outcomes.append("taken")
        except RewardFailure as failure:
            outcomes.append(failure.detail)
        budget.close()

    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE spent SET requests = 2")
    thread = threading.Thread(target=take)
    thread.start()
    thread.join(0.5)
    other.execute("COMMIT")
    other.close()
    thread.join()
    assert outcomes == ["2 of 2 requests are spent"]


def test_tokens_of_a_budget(judge, endpoint, tmp_path):
    settings = {"budget_tokens": 150, "folder": tmp_path}
    assert judge("no", **settings).failure.startswith("bad_score"), "paid for all the same"
    assert judge("Score: 9", **settings).reward == 0.9
    assert judge("Score: 9", **settings).failure == "budget: 200 of 150 tokens are spent"
    endpoint.usage = None
    assert judge("Score: 9", budget_tokens=5, folder=tmp_path / "b").failure.startswith(
        "budget: the endpoint reports no"
    )


def test_a_budget_that_cannot_be_counted_is_not_spent(judge, endpoint, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    assert judge(budget_requests=3, folder=tmp_path).failure.startswith("budget: cannot be counted: ")
    assert not endpoint.requests


PROMPT = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="?", reference="2", columns={})


def score(workers, count, cache=None, same=False):
    scorer = RewardScorer(workers, lambda parts: str(parts[0]), cache=cache)
    for index in range(count):
        scorer.submit(PROMPT, index, [np.array([0 if same else index])], "stop")
    assert scorer.drain(60)
    return scorer.poll(), scorer.take_counts()


def config(endpoint, **settings) -> RewardConfig:
    args = {"url": endpoint.url, "model": "tiny", "rubric": RUBRIC, "backoff_s": 0.01, **settings}
    return RewardConfig(function="judge", args=args, workers=2)


def test_workers_share_one_budget_and_the_cache_saves_it(endpoint, tmp_path):
    """Two processes and 12 responses, of which 5 may be asked for; then the same again, from the cache."""
    cache = RewardResultCache(tmp_path, print)
    workers = RewardWorkers(config(endpoint, budget_requests=5), folder=tmp_path)
    try:
        workers.wait_ready()
        results, counts = score(workers, 12, cache)
        failures = [result.failure for result in results if result.failure]
        assert failures == ["budget: 5 of 5 requests are spent"] * 7 and counts.calls == 12
        assert all(result.reward == 0.5 for result in results if not result.failure)
        assert len(endpoint.requests) == 5 and spent(tmp_path) == (5, 0)
        results, counts = score(workers, 12, cache)
        assert counts.cache_hits == 5 and sum(result.reward == 0.5 for result in results) == 5
        assert len(endpoint.requests) == 5
    finally:
        workers.close()
        cache.close()


def test_without_a_run_the_budget_ends_with_the_workers(endpoint):
    workers = RewardWorkers(config(endpoint, budget_requests=5))
    folder = workers._own_folder
    try:
        workers.wait_ready()
        results, _ = score(workers, 12)
        assert sum(result.reward == 0.5 for result in results) == 5 and folder.is_dir()
    finally:
        workers.close()
    assert not folder.exists()


def test_in_the_runs_own_process(endpoint, tmp_path):
    calls = InlineCalls(load_functions(config(endpoint, budget_requests=2), None, tmp_path))
    results, _ = score(calls, 4)
    assert sum(result.reward == 0.5 for result in results) == 2 and spent(tmp_path) == (2, 0)
    calls.close()
