"""Naming parts: tables, dotted paths, ``_target_``, and one clear line for everything that cannot work."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from rlpost.config.plugins import MOVED, Part, check_target, find_part, resolve_target
from rlpost.errors import ConfigError

TABLE = {"square": Part("their_parts.square"), "sqrt": Part("math.sqrt")}
SOURCE = """
import math as _math
from math import hypot

LIMIT: int = 3  # not callable


def square(x, *, scale=1.0):
    return scale * x * x


class Adder:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, x):
        return x + self.amount


class Silent:
    pass
"""


@pytest.fixture(autouse=True)
def their_package(tmp_path, monkeypatch):
    (tmp_path / "their_parts.py").write_text(SOURCE)
    (tmp_path / "broken_parts.py").write_text("raise RuntimeError('no\\nluck')\ndef f(): pass\n")
    (tmp_path / "leaving_parts.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "unparsable_parts.py").write_text("def f(:\n")
    (tmp_path / "costly_parts.py").write_text("import torch\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("their_parts", "broken_parts", "leaving_parts", "unparsable_parts", "costly_parts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "value",
    [
        "square",
        "their_parts.square",
        {"_target_": "square"},
        {"_target_": "their_parts.square", "_partial_": True},
        OmegaConf.create({"_target_": "their_parts.square"}),
    ],
)
def test_the_forms_are_alike(value) -> None:
    check_target(value, TABLE, "algo.loss")
    assert resolve_target(value, TABLE, "algo.loss")(3) == 9
    assert find_part(value, TABLE) is TABLE["square"]


@pytest.mark.parametrize("value", [None, len, "their_parts.Adder", {"_target_": "math.hypot"}, {"scale": 2}])
def test_a_users_own_part_has_no_entry(value) -> None:
    assert find_part(value, TABLE) is None


def test_keys_are_bound_and_interpolations_resolved() -> None:
    config = OmegaConf.create({"scale": 2.0, "part": {"_target_": "their_parts.square", "scale": "${scale}"}})
    assert resolve_target(config.part, TABLE, "algo.loss")(3) == 18


def test_a_class_is_instantiated_and_a_callable_is_taken_as_it_is() -> None:
    assert resolve_target({"_target_": "their_parts.Adder", "amount": 5}, TABLE, "reward.function")(3) == 8
    assert resolve_target(len, TABLE, "reward.function") is len


def test_unknown_name_lists_the_names_and_the_nearest() -> None:
    for function in (resolve_target, check_target):
        with pytest.raises(ConfigError) as error:
            function("sqare", TABLE, "algo.loss")
        message = str(error.value)
        assert message.startswith("algo.loss: got 'sqare'; expected square, sqrt, package.module.function")
        assert "did you mean square?" in message and "\n" not in message


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("their_parts.sqare", "did you mean square?"),
        ("no_such_parts.f", "no_such_parts"),
        ("no_such_parts.sub.f", "no_such_parts"),
        ("unparsable_parts.f", "SyntaxError"),
        ({"scale": 2}, "_target_"),
        ({"_target_": "square", "_args_": [1]}, "_args_"),
        (None, "square"),
        ("", "square"),
        (7, "square"),
    ],
)
def test_what_both_refuse(value, part) -> None:
    for function in (check_target, resolve_target):
        with pytest.raises(ConfigError, match=part) as error:
            function(value, TABLE, "algo.loss")
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("algo.loss: got ")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("broken_parts.f", "RuntimeError: no luck"),
        ("leaving_parts.f", "SystemExit: 0"),
        ({"_target_": "their_parts.square", "scael": 2}, "scael"),
        ({"_target_": "their_parts.Adder", "much": 2}, "much"),
        ("their_parts.LIMIT", "callable class"),
        ({"_target_": "their_parts.Silent"}, "__call__"),
    ],
)
def test_what_only_importing_shows(value, part) -> None:
    with pytest.raises(ConfigError, match=part):
        resolve_target(value, TABLE, "algo.loss")


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlpost.config.plugins import check_target; from rlpost.algos import table, advantages, batch;"
        "from rlpost.config import AlgoConfig;"
        "check_target('costly_parts.f', {}, 'algo.loss'); table.check_algo(AlgoConfig());"
        "table.resolve('advantage', 'rloo'); assert 'torch' not in sys.modules and 'costly_parts' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})


def test_a_module_that_has_moved_is_named():
    with pytest.raises(ConfigError, match="expected rlpost.rewards.library.math_answers.math_answer; the"):
        check_target("rlpost.rewards.math_answers.math_answer", {}, "reward.function")
    for module in MOVED.values():
        importlib.import_module(module)
