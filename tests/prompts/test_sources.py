"""Several sources: their descriptions, their shares of the draws, and resuming."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.config import Config, DataConfig, SourceConfig
from rlpost.errors import ConfigError, DataError
from rlpost.prompts.cursor import MixedCursor, PromptCursor, draw_prompts, open_cursor
from rlpost.prompts.encoding import build_prompts
from rlpost.prompts.sources import list_sources, load_split
from rlpost.types import source_of
from tests.prompts.test_prompts import CharTokenizer


def sources(split="train", **described):
    return DataConfig(**{split: SourceConfig(sources=described)})


@pytest.mark.parametrize(
    ("described", "text"),
    [
        ({"a/b": {"path": "x"}}, "a name of letters, digits"),
        ({"failed": {"path": "x"}}, "not failed or part"),
        ({"a": "x.jsonl"}, "expected a mapping such as {path: FILE.jsonl}"),
        ({"a": {"path": "x", "wieght": 2}}, "got 'wieght'; expected only path"),
        ({"a": {"path": 20261201}}, "data.train.sources.a.path: got 20261201; expected text"),
        ({"a": {"path": "x", "weight": 0}}, "weight: got 0; expected a number > 0"),
        ({"a": {"path": "x", "weight": True}}, "weight: got True"),
        ({"a": {"path": "x", "weight": float("nan")}}, "weight: got nan"),
        ({"a": {"path": "x", "weight": float("inf")}}, "weight: got inf"),
        ({"a": {"path": "x", "weight": "2"}}, "weight: got '2'"),
        ({"a": {"path": "x", "limit": 0}}, "limit: got 0"),
        ({"a": {"path": "x", "unique": "yes"}}, "unique: got 'yes'"),
        ({"a": {"path": "x", "format": "csv"}}, "format: got 'csv'"),
        ({"a": {"path": "x", "sources": {}}}, "got 'sources'; expected only path"),
    ],
)
def test_a_source_that_is_not_described_as_it_must_be(described, text):
    with pytest.raises(ConfigError) as caught:
        list_sources(sources(**described), "train")
    assert text in str(caught.value)


def test_weights_are_for_training_and_one_source_or_several():
    with pytest.raises(ConfigError, match=r"data\.eval\.sources\.a: got 'weight'"):
        list_sources(sources("eval", a={"path": "x", "weight": 1}), "eval")
    both = DataConfig(train=SourceConfig(path="x.jsonl", sources={"a": {"path": "y"}}))
    with pytest.raises(ConfigError, match=r"data\.train\.path: got 'x\.jsonl'; expected nothing beside"):
        list_sources(both, "train")
    for name, value in (("limit", 10), ("unique", True), ("subset", "main"), ("split", "test")):
        beside = DataConfig(train=SourceConfig(**{name: value}, sources={"a": {"path": "y"}}))
        with pytest.raises(ConfigError, match=rf"data\.train\.{name}: got .*; give it to each source"):
            list_sources(beside, "train")
    (one,) = list_sources(DataConfig(format="verl", train=SourceConfig(path="x")), "train")
    assert (one.name, one.key, one.format, one.weight) == ("", "data.train", "verl", None)
    described = {"a": {"path": "x", "format": "trl", "weight": 2}, "b": {"hub": "h", "weight": 1.5}}
    one, other = list_sources(sources(**described), "train")
    assert (one.name, one.key, one.format, one.weight) == ("a", "data.train.sources.a", "trl", 2)
    assert (other.config.hub, other.format, other.weight) == ("h", "columns", 1.5)
    del described["b"]["weight"]
    with pytest.raises(ConfigError, match=r"data\.train\.sources: got 'weights for a only'"):
        list_sources(sources(**described), "train")


def test_rows_and_limits_are_those_of_each_source(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "a{n}"}}\n' for n in range(5)))
    (tmp_path / "b.csv").write_text("instruction,output\nAdd.,4\nSub.,5\n")
    cfg = Config()
    described = {
        "a": {"path": str(tmp_path / "a.jsonl"), "limit": 4},
        "b": {"path": str(tmp_path / "b.csv"), "format": "alpaca"},
    }
    cfg.data = sources(**described)
    cfg.data.eval = SourceConfig(sources=described)
    cfg.eval.max_prompts = 3
    assert {s.name: [row["prompt"] for row in rows] for s, rows in load_split(cfg, "train")} == {
        "a": ["a0", "a1", "a2", "a3"],
        "b": ["Add.", "Sub."],
    }
    assert [len(rows) for _, rows in load_split(cfg, "eval")] == [3, 2]
    (tmp_path / "b.csv").unlink()
    with pytest.raises(DataError, match=r"data\.train\.sources\.b\.path: nothing there"):
        list(load_split(cfg, "train"))


def prompt_sets(**numbers):
    def make(name, number, weight):
        rows = [{"prompt": f"{name}{n}"} for n in range(number)]
        data = DataConfig(reference_key=None)
        return build_prompts(rows, data, CharTokenizer(), max_prompt_tokens=None, name=name, weight=weight)

    return [make(name, *given) for name, given in numbers.items()]


def test_draws_are_of_the_named_rows_and_resume_where_they_were():
    def start():
        sets = prompt_sets(a=(5, None), b=(3, 10.0), c=(1, 0.5))
        cursor = open_cursor(sets, seed=3, shuffle=True)
        return cursor, draw_prompts(cursor, sets)

    cursor, prompts = start()
    drawn = [next(prompts) for _ in range(120)]
    counts = Counter(source_of(p.uid) for p in drawn)
    assert all(p.text.startswith(source_of(p.uid)) for p in drawn)
    assert counts == {"a": 39, "b": 77, "c": 4}  # 5 : 10 : 0.5 of 120
    epoch = [p.text for p in drawn if p.uid.startswith("b/1:")]
    assert sorted(epoch) == ["b0", "b1", "b2"]
    first, state = start(), None
    for _ in range(50):
        next(first[1])
    state = first[0].state_dict()
    resumed, rest = start()
    resumed.load_state_dict(state)
    assert resumed.num_drawn == 50
    assert [(p.uid, p.text) for p in (next(rest) for _ in range(70))] == [(p.uid, p.text) for p in drawn[50:]]
    texts = {p.uid: p.text for p in drawn}
    names = [f"{name}{n}" for name, number in (("a", 5), ("b", 3), ("c", 1)) for n in range(number)]
    assert all(names[resumed.find_row(uid)] == text for uid, text in texts.items())


def test_other_sources_shares_or_data_are_refused():
    def cursor(*sets):
        return open_cursor(sets, seed=0, shuffle=True)

    a, b = prompt_sets(a=(4, 1.0), b=(4, 2.0))
    state = cursor(a, b).state_dict()
    cursor(a, b).load_state_dict(state)
    heavier, longer = prompt_sets(b=(4, 3.0))[0], prompt_sets(b=(5, 2.0))[0]
    other = prompt_sets(c=(4, 2.0))[0]
    for sets in ((b, a), (a, heavier), (a, longer), (a, other), (a,)):
        with pytest.raises(DataError, match="resuming"):
            cursor(*sets).load_state_dict(state)
    with pytest.raises(DataError, match=r"resuming: data\.train\.sources"):
        PromptCursor(4).load_state_dict(state)
    with pytest.raises(DataError, match="resuming"):
        cursor(a, b).load_state_dict(PromptCursor(4).state_dict())


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 300))
def test_every_source_has_its_share_at_any_time(weights, draws):
    cursor = MixedCursor({f"s{n}": (PromptCursor(3), weight) for n, weight in enumerate(weights)})
    counts = Counter(source_of(cursor.draw()[0]) for _ in range(draws))
    for n, weight in enumerate(weights):
        assert abs(counts[f"s{n}"] - draws * weight / sum(weights)) < len(weights)
