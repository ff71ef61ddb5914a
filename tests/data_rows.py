"""Reading rows in tests: all of them at once, so that an error in any of them is raised here."""

from __future__ import annotations

from typing import Any

from rlpost.config import SourceConfig
from rlpost.prompts.rows import Row
from rlpost.prompts.sources import load_rows


def read_rows(source: SourceConfig, **options: Any) -> list[Row]:
    return list(load_rows(source, **options))
