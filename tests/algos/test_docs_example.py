"""The worked example of docs/algorithms.md runs as it is printed, and the tables there name every part."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rlpost.algos import batch as batching
from rlpost.algos import table
from rlpost.algos.algorithm import build_algorithm
from rlpost.config import Config
from rlpost.config.plugins import resolve_target
from tests.algos.making import group, sample, segment

DOC = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)
    return text


@pytest.fixture
def my_rl(tmp_path, monkeypatch):
    (tmp_path / "my_rl").mkdir()
    (tmp_path / "my_rl" / "__init__.py").write_text("")
    (tmp_path / "my_rl" / "parts.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "my_rl"]:
        del sys.modules[name]


def test_the_worked_example(my_rl) -> None:
    cfg: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(block("yaml"))))  # type: ignore[assignment]
    table.check_algo(cfg.algo)
    algorithm = build_algorithm(cfg)
    two = group(sample(1.0, segment(2)), sample(0.0, segment(1)))
    assert algorithm.reject(two) is None and algorithm.reject(group(sample(1.0, segment(2)))) == "too_short"
    (advantages,) = algorithm.advantages([two])
    np.testing.assert_allclose(advantages, [0.45, 0.0])

    (batch,) = batching.build_batches([two], [advantages], policy_version=0, max_row_tokens=16)
    row = replace(batch.rows[0], old_logprobs=np.where(batch.rows[0].loss_mask, -1.0, 0.0).astype(np.float32))
    logprobs = torch.full((7,), -0.9, requires_grad=True)
    loss, metrics = algorithm.objective(logprobs, None, row, batch)
    gate = np.tanh(0.2) / 2
    assert loss.item() == pytest.approx(-(1 + gate) * 0.45 * 2 / 3, rel=1e-5)
    total, count = metrics["loss/gate"]
    assert total.item() / count.item() == pytest.approx(gate, rel=1e-5)

    reward = resolve_target(cfg.reward.function, {}, "reward.function")
    parts = reward("13, please", prompt="?", reference="13", finish_reason="stop", columns={})
    assert parts == {"accuracy": 1.0, "polite": 0.2}


def test_the_tables_name_every_part() -> None:
    for kind, names in table.TABLES.items():
        for name in names:
            assert f"`{name}`" in DOC or f"{kind}: {name}" in DOC, (kind, name)
