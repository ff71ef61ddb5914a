"""The registry of metric names: well formed, held to the source, and the page written from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rlpost.reporting import metric_names

ROOT = Path(__file__).parents[2]
LOGGED = re.compile(rf"({'|'.join(metric_names.AREAS)})/[A-Za-z0-9_*/]+")


def names_in_source() -> dict[str, str]:
    """Every string of the package that is a metric's name, f-strings with * for what they fill in -> its file."""
    found: dict[str, str] = {}
    for file in (ROOT / "rlpost").rglob("*.py"):
        if file.name == "metric_names.py":
            continue
        tree = ast.parse(file.read_text())
        inside_f_strings = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
        for node in ast.walk(tree):
            text = None
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside_f_strings:
                text = node.value
            if text is not None and LOGGED.fullmatch(text):
                found[text] = str(file.relative_to(ROOT))
    return found


def pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", ".+"))


def test_every_name_in_the_source_is_in_the_registry() -> None:
    examples = [metric.name.replace("*", "lag_0") for metric in metric_names.REGISTRY]

    def known(name: str) -> bool:
        if metric_names.find(name.replace("*", "lag_0")) is not None:
            return True
        return "*" in name and any(pattern(name).fullmatch(example) for example in examples)

    assert not {name: file for name, file in names_in_source().items() if not known(name)}


def test_every_name_in_the_registry_is_logged_by_something() -> None:
    patterns = [pattern(name) for name in names_in_source()]
    written_by_the_log = {"step", "time_s"}
    names = {metric.name for metric in metric_names.REGISTRY} - written_by_the_log
    assert not {name for name in names if not any(p.fullmatch(name.replace("*", "lag_0")) for p in patterns)}


def test_names_are_unique_and_in_a_known_area() -> None:
    names = [metric.name for metric in metric_names.REGISTRY]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names if "/" in name} == set(metric_names.AREAS)
    assert all(metric.meaning.endswith(".") for metric in metric_names.REGISTRY)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mismatch/lag_0/ratio", "mismatch/*/ratio"),
        ("mismatch/lag_4_plus/token_share", "mismatch/*/token_share"),
        ("rollout/version_span/3", "rollout/version_span/*"),
        ("rollout/idle_share", "rollout/idle_share"),
        ("reward/failed", "reward/failed"),
    ],
)
def test_a_name_is_found_by_itself_or_by_its_family(name: str, line: str) -> None:
    metric = metric_names.find(name)
    assert metric is not None and metric.name == line


@pytest.mark.parametrize("name", ["rollout/idel_share", "rollout/version_span/3/4", "mismatch/lag_0", "xloss/kl"])
def test_a_misspelt_name_is_not_found(name: str) -> None:
    assert metric_names.find(name) is None


def test_the_page_is_written_from_the_registry() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == metric_names.render(), (
        "docs/metrics.md is out of date: python -m rlpost.reporting.metric_names > docs/metrics.md"
    )
