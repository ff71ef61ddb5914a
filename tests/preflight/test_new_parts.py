"""A new part is a function and one line in one table: checks, builders and pages then know it without being told."""

from __future__ import annotations

import sys

import pytest

from rlpost import rewards
from rlpost.algos import table
from rlpost.algos.algorithm import build_algorithm
from rlpost.algos.objective import kl_is_in_reward
from rlpost.cli import config_reference
from rlpost.cli.commands import describe_keys
from rlpost.config import Config, RewardConfig
from rlpost.errors import ConfigError
from rlpost.preflight.check_values import check_values
from rlpost.rewards.functions import load_functions
from rlpost.rewards.selection import runs_in_process

SOURCE = """
import numpy as np

def estimate(groups, *, eps):
    return [np.asarray(rewards, float) + 5 for rewards in groups]

def part(*args, **kwargs):
    raise AssertionError("not called here")

def score(response, **_):
    return 1.0
"""
KINDS = list(table.TABLES)


@pytest.fixture(autouse=True)
def new_parts(tmp_path, monkeypatch):
    (tmp_path / "new_parts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("new_parts", None)


def add(monkeypatch, kind: str, entry) -> Config:
    """The line in the table, and a configuration that names it."""
    cfg = Config()
    if kind == "reward":
        monkeypatch.setitem(rewards.REWARDS, "newest", entry)
        cfg.reward.function = "newest"
    else:
        monkeypatch.setitem(table.TABLES[kind], "newest", entry)
        setattr(cfg.algo, kind, "newest")
    return cfg


def cells(key: str) -> list[str]:
    (line,) = [line for line in config_reference.render().splitlines() if line.startswith(f"| `{key}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def without_line(kind: str) -> Config:
    cfg = Config()
    setattr(cfg.algo, kind, "newest")
    return cfg


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_an_algorithm_is_one_line(kind, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=f"algo.{kind}: got 'newest'"):
        check_values(without_line(kind), "train")
    cfg = add(monkeypatch, kind, table.Part("new_parts.part"))
    check_values(cfg, "train")
    build_algorithm(cfg)
    assert table.resolve(kind, "newest").__module__ == "new_parts"
    assert "`newest`" in cells(f"algo.{kind}")[2] and "newest" not in cells(f"algo.{kind}")[3]
    assert "newest" in describe_keys(f"algo.{kind}")
    with pytest.raises(ConfigError, match="newest"):
        setattr(cfg.algo, kind, "newst")
        check_values(cfg, "train")


def test_an_estimator_is_used(monkeypatch) -> None:
    algorithm = build_algorithm(add(monkeypatch, "advantage", table.Part("new_parts.estimate")))
    assert algorithm.estimate([[1.0]], eps=0.0)[0].tolist() == [6.0]


@pytest.mark.parametrize("kind", ["advantage", "filter"])
def test_what_compares_a_group_says_so_in_its_line(kind, monkeypatch) -> None:
    cfg = add(monkeypatch, kind, table.Part("new_parts.part"))
    cfg.rollout.samples_per_group = 1
    if kind == "filter":
        cfg.algo.advantage = "reinforce_pp"
    check_values(cfg, "train")
    monkeypatch.setitem(table.TABLES[kind], "newest", table.Part("new_parts.part", compares_group=True))
    with pytest.raises(ConfigError, match="rollout.samples_per_group: got 1; expected >= 2; .*newest compares"):
        check_values(cfg, "train")
    cfg.rollout.samples_per_group = 2
    check_values(cfg, "train")
    assert "newest" in cells(f"algo.{kind}")[3]


def test_an_estimator_of_the_kl_says_where_it_goes(monkeypatch) -> None:
    cfg = add(monkeypatch, "kl_estimator", table.Part("new_parts.part"))
    cfg.algo.kl_coef = 0.1
    assert not kl_is_in_reward(cfg.algo) and not build_algorithm(cfg).kl_in_reward
    monkeypatch.setitem(table.KL_ESTIMATORS, "newest", table.Part("new_parts.part", in_reward=True))
    assert kl_is_in_reward(cfg.algo) and build_algorithm(cfg).kl_in_reward
    assert "newest" in cells("algo.kl_estimator")[3]


def test_a_reward_is_one_line(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="reward.function: got 'newest'"):
        load_functions(RewardConfig(function="newest"))
    cfg = add(monkeypatch, "reward", rewards.Shipped("new_parts.score"))
    check_values(cfg, "train")
    (loaded,) = load_functions(cfg.reward)
    assert loaded.target("any") == 1.0
    assert "`newest`" in cells("reward.function")[2] and "newest" not in cells("reward.function")[3]
    assert not runs_in_process(cfg.reward)
    monkeypatch.setitem(rewards.REWARDS, "newest", rewards.Shipped("new_parts.score", in_process=True))
    assert runs_in_process(cfg.reward)
    assert "newest" in cells("reward.function")[3]
