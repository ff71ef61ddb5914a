"""The examples of docs/rewards.md run as they are printed, in a worker as in a run."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlpost.config import Config, RewardConfig
from rlpost.preflight.check_values import check_values
from rlpost.rewards import REWARDS
from rlpost.rewards.library.reward_model import RewardModel
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.selection import list_functions
from rlpost.rewards.worker_pool import RewardWorkers
from rlpost.types import Prompt

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
SINGLE, SEVERAL, HTTP, JUDGE, MODEL = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Verdicts of one group, by a reward section of the page or a function of it; responses are characters."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    started = []

    def run(reward, *responses, columns=None):
        cfg = to_config(reward) if isinstance(reward, str) and "\n" in reward else RewardConfig(function=reward)
        cfg.workers = 1
        workers = RewardWorkers(cfg, "answer")
        started.append(workers)
        workers.wait_ready()
        scorer = RewardScorer(workers, lambda parts: "".join(map(chr, parts[0])), group_size=len(responses))
        prompt = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="?", reference="13", columns=columns or {})
        for index, text in enumerate(responses):
            scorer.submit(prompt, index, [np.array([ord(c) for c in text], np.int32)], "stop")
        assert scorer.drain(60)
        return sorted(scorer.poll(), key=lambda verdict: verdict.index)

    yield run
    for workers in started:
        workers.close()


def to_config(section):
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(section))
    cfg = OmegaConf.to_object(merged)
    check_values(cfg, "train")
    return cfg.reward


def test_one_answer(judge):
    right, wrong = judge(SINGLE, "5+8=13#13", "#14")
    assert right.reward == pytest.approx(1 - 0.002 * 9) and right.parts == {"accuracy": 1.0, "length": -0.002 * 9}
    assert wrong.parts["accuracy"] == 0.0


def test_a_part_named_reward_and_a_failure_of_ones_own(judge):
    (verdict,) = judge("my_rewards.level", "13", columns={"level": 3})
    assert (verdict.reward, verdict.parts) == (3.0, {"accuracy": 1.0})
    (verdict,) = judge("my_rewards.level", "13")
    assert verdict.failure == "no_level: the row has no column level"


def test_a_group(judge):
    assert [v.reward for v in judge("my_rewards.ranked", "it is 13", "13", "12", "")] == [0.5, 1.0, 0.0, 0.0]


def test_trl(judge):
    right, empty, wrong = judge("my_rewards.trl_style", "#13", "", "12")
    assert (right.reward, wrong.reward) == (1.0, 0.0) and empty.failure.startswith("none")


def test_async_and_classes(judge):
    assert [v.reward for v in judge("my_rewards.patient", "13!", "12")] == [1.0, 0.0]
    assert [v.reward for v in judge({"_target_": "my_rewards.Counting", "word": "a"}, "banana")] == [3.0]


def test_several_with_weights(judge):
    first, second = judge(SEVERAL, r"<think>5+8</think> \boxed{13}", "13")
    assert first.parts == {"right": 1.0, "accuracy": 1.0, "right.format": 1.0, "form": 1.0, "rank": 0.0}
    assert first.reward == pytest.approx(1.2)
    assert second.parts == {"right": 0.0, "accuracy": 0.0, "right.format": 0.0, "form": 0.0, "rank": 1.0}
    assert second.reward == pytest.approx(0.1)


def test_http_is_a_configuration_that_is_taken(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    (verdict,) = judge(HTTP.replace("retries: 3", "retries: 0").replace(":8123", ":9"), "13")
    assert verdict.failure.startswith("http_error: ClientConnectorError")


def test_a_judge_is_a_configuration_that_is_taken(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    section = JUDGE.replace(":8000", ":9").replace("model: NAME", "model: NAME\n    retries: 0")
    (verdict,) = judge(section, "13")
    assert verdict.failure.startswith("http_error: ClientConnectorError")
    (pattern,) = re.findall(r"pattern: '(.*)'", JUDGE)
    assert re.search(pattern, "Good.\nScore: 4/5")[1] == "4/5"


def test_a_reward_model_is_a_configuration_that_is_taken():
    (spec,) = list_functions(to_config(MODEL))
    inspect.signature(RewardModel).bind(**spec.args)


def test_the_table_of_a_reward_models_arguments():
    (table,) = re.findall(r"^\| Argument \| Default \| Meaning \|\n(.*?)\n\n", PAGE, re.DOTALL | re.MULTILINE)
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert set(named) | {"path", "batch_size"} == set(inspect.signature(RewardModel).parameters)


def test_the_tables_name_what_there_is():
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(REWARDS) <= named
    sentence = " ".join(re.findall(r"^`exact_answer`.*?in the run's own process", PAGE, re.DOTALL | re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name, part in REWARDS.items() if part.in_process}


def test_the_functions_of_the_page_are_all_tried():
    assert len(list_functions(to_config(SEVERAL))) == 3 and len(list_functions(to_config(SINGLE))) == 1
