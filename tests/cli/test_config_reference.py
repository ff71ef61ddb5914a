"""docs/configuration.md is what rlpost/cli/config_reference.py writes, and that names every key of the schema once."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path

import yaml

from rlpost.cli import config_reference
from rlpost.cli.key_texts import allowed
from rlpost.config import walk_fields

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([a-z_0-9.]+)` \| `(.*?)` \| (.*?) \| (.+) \|$", re.MULTILINE)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_reference.render(), (
        "the schema changed: python -m rlpost.cli.config_reference > docs/configuration.md"
    )


def test_every_key_stands_there_once_with_its_default_what_is_allowed_and_its_meaning() -> None:
    rows = ROW.findall(config_reference.render())
    schema = [key for key in walk_fields() if not is_dataclass(key.default)]
    assert sorted(name for name, *_ in rows) == sorted(key.name for key in schema)
    written = {name: cells for name, *cells in rows}
    for key in schema:
        name, default = key.name, key.default
        text, values, meaning = written[name]
        has_table = key.rule is not None and bool(key.rule.table)
        assert meaning.replace("\\|", "|") == key.doc or (has_table and meaning.startswith(key.doc)), name
        assert values.replace("`", "") == allowed(key), name
        assert bool(values) == (key.rule is not None), name
        if isinstance(default, str) and default:
            assert text == default, name  # as it is: {prompt} would be a mapping to YAML
        elif isinstance(default, float):
            assert float(text) == default, name  # YAML 1.1 takes 1e-06 for text
        else:
            assert yaml.safe_load(text) == default, name


def test_a_bar_in_a_meaning_does_not_end_its_cell() -> None:
    (line,) = [line for line in config_reference.render().splitlines() if line.startswith("| `mismatch_stop`")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5


def test_what_is_allowed_is_the_rules_own() -> None:
    rows = {name: values for name, _, values, _ in ROW.findall(config_reference.render())}
    assert rows["train.lr"] == "> 0" and rows["rollout.top_p"] == "> 0 and <= 1"
    assert rows["device"] == "`auto`, `cpu`, `cuda`" and rows["model.path"] == ""
    assert rows["algo.loss"] == "`clipped`, `gspo`, `cispo`, or `{_target_: ...}`"
    assert rows["algo.kl_estimator"] == "`k1`, `k2`, `k3`, or `package.module.function`"
