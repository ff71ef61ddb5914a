"""docs/configuration.md is what rlpost/cli/config_reference.py writes, and that names every key of the schema once."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path

import yaml

from rlpost.cli import config_reference
from rlpost.config import walk_fields

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([a-z_0-9.]+)` \| `(.*?)` \| (.+) \|$", re.MULTILINE)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_reference.render(), (
        "the schema changed: python -m rlpost.cli.config_reference > docs/configuration.md"
    )


def test_every_key_stands_there_once_with_its_default_and_meaning() -> None:
    rows = ROW.findall(config_reference.render())
    schema = [(name, default, doc) for name, default, doc in walk_fields() if not is_dataclass(default)]
    assert sorted(name for name, _, _ in rows) == sorted(name for name, _, _ in schema)
    written = {name: (default, meaning) for name, default, meaning in rows}
    for name, default, doc in schema:
        text, meaning = written[name]
        assert meaning.replace("\\|", "|") == doc, name
        if isinstance(default, str) and default:
            assert text == default, name  # as it is: {prompt} would be a mapping to YAML
        elif isinstance(default, float):
            assert float(text) == default, name  # YAML 1.1 takes 1e-06 for text
        else:
            assert yaml.safe_load(text) == default, name


def test_a_bar_in_a_meaning_does_not_end_its_cell() -> None:
    (line,) = [line for line in config_reference.render().splitlines() if line.startswith("| `mismatch_stop`")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 4
