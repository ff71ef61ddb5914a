"""The page ``docs/configuration.md``, written from the schema: every key, its default, what it may be, its meaning.

Owns the page's layout and its introduction; the texts are the schema's own and the tables' (``rlpost.cli.key_texts``).
``python -m rlpost.cli.config_reference > docs/configuration.md`` writes it, ``tests/cli/test_config_reference.py``
holds the page to the schema. Imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from typing import Any

from rlpost.cli.key_texts import allowed, meaning
from rlpost.config import walk_fields

INTRODUCTION = """\
# Configuration

Every key a run has, with its default, what is allowed and its meaning. Written by
`python -m rlpost.cli.config_reference` from the schema, `rlpost/config/schema.py`, which is the only place where a
default, a bound or an option stands. `rlpost config --keys` prints the same list, and `rlpost config --keys train` a
part of it.

A configuration is put together in this order; what comes later wins:

1. the defaults below;
2. one file of each group in `conf/`: `model`, `data`, `reward`, `algo`, `rollout`, `engine`, `train`, `cluster`,
   `logging`. `conf/config.yaml` says which one when nobody chooses;
3. the recipe, `recipe=GROUP/NAME` below `recipes/` or `recipe=path/to/mine.yaml`. It chooses files of the groups in its
   `defaults` list and sets single keys;
4. files of groups named on the command line: `algo=gspo`, `rollout=sync`, `train=zero3`. Such a choice also takes back
   what the recipe had set for the keys that the files of this group set;
5. single keys on the command line: `train.lr=2e-6`.

So the value in a run can differ from the default below even when you set nothing: `algo=grpo`, for example, sets
`algo.reduction=sequence_mean`. To see the values that a run would really use:

```sh
rlpost config recipe=math/arithmetic            # everything, as YAML; saved as config.yaml in the run's folder
rlpost check recipe=math/arithmetic             # what follows from it: batch sizes, memory, data
```

A key that does not exist, a value of the wrong type, a value out of range and a combination that cannot work all end
with one line that says what was found, what was expected and what to do, before a model or a device is touched.

Where a key takes a part of the program (`reward.function`, `algo.loss`, a `generator`), it takes a name, a dotted path
`package.module.function`, or a mapping with `_target_`: see [data and rewards](data-and-rewards.md) and
[algorithms](algorithms.md#your-own-parts). The names listed below are those of the parts that ship. Where a meaning
says None, write `null`. Where nothing is listed as allowed, anything of the key's type is.
"""


def render() -> str:
    """The whole page, with a table for the top level and one for each section of the schema."""
    lines = [INTRODUCTION, "## Top level", "", *_table("")]
    for key in walk_fields():
        if is_dataclass(key.default):
            lines += ["", f"## {key.name}", "", key.doc, "", *_table(f"{key.name}.")]
    return "\n".join(lines) + "\n"


def _table(prefix: str) -> list[str]:
    """The keys directly below ``prefix``; those of a section inside it have a table of their own."""
    rows = []
    for key in walk_fields():
        if key.name.startswith(prefix) and "." not in key.name.removeprefix(prefix) and not is_dataclass(key.default):
            cells = [f"`{key.name}`", f"`{_as_yaml(key.default)}`", allowed(key, mark="`"), meaning(key)]
            rows.append(f"| {' | '.join(map(_cell, cells))} |")
    return ["| Key | Default | Allowed | Meaning |", "|---|---|---|---|", *rows] if rows else ["Only sections."]


def _as_yaml(value: Any) -> str:
    """As one would write it in a recipe or on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
