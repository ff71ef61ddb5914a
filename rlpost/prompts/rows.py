"""Data rows: JSONL and Parquet files, datasets from the hub, and a user's generator, each row with its origin.

What a value may be is ``prompts.conversion``'s to say. ``datasets`` is imported only in the function that needs it.
Called by ``session``, ``preflight`` and benchmarks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.config import Config, SourceConfig, plugins
from rlpost.config.locations import resolve_path
from rlpost.errors import ConfigError, DataError, explain
from rlpost.prompts.conversion import MAX_DEPTH, plain_columns, refuse, refuse_whole_number

PARQUET = b"PAR1"


class Row(dict[str, Any]):
    """One data row: its columns, and its origin for messages (``train.jsonl line 3``)."""

    def __init__(self, columns: Mapping[str, Any], origin: str) -> None:
        super().__init__(columns)
        self.origin = origin


def load_split(cfg: Config, split: str) -> list[Row]:
    """The rows that a run uses for ``split``, train or eval. Raises what :func:`load_rows` raises."""
    source: SourceConfig = getattr(cfg.data, split)
    rows = load_rows(source, prompt_key=cfg.data.prompt_key, key=f"data.{split}")
    return rows[: cfg.eval.max_prompts] if split == "eval" else rows


def load_rows(source: SourceConfig, *, prompt_key: str = "prompt", key: str = "data.train") -> list[Row]:
    """The rows of a source: its file, else the hub's dataset, else its generator.

    Args:
        prompt_key: the column that ``source.unique`` compares.
        key: the config key of the source, for messages.

    Raises DataError for a file that is missing, malformed (with the line) or empty, and ConfigError for no source.
    """
    if source.path is not None:
        rows = read_file(Path(resolve_path(source.path)), key=f"{key}.path")
    elif source.hub is not None:
        rows = _load_hub(source, key)
    elif source.generator is not None:
        rows = _generate(source.generator, f"{key}.generator")
    else:
        raise ConfigError(f"{key}: no source; expected one of path, hub, generator; set {key}.path=FILE.jsonl")
    if source.unique:
        rows = _leave_out_repeats(rows, prompt_key)
    rows = rows if source.limit is None else rows[: source.limit]
    if not rows:
        raise DataError(explain(key, "no rows", "at least one", "check the source and its limit"))
    return rows


def read_file(path: Path, key: str = "data") -> list[Row]:
    """A Parquet file, known by its first bytes, or JSONL. Raises DataError naming file and line or row."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing there"
        raise DataError(f"{key}: {what} at {path}; expected a JSONL or Parquet file; check the path")
    try:
        with path.open("rb") as opened:
            is_parquet = opened.read(len(PARQUET)) == PARQUET
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error.strerror}; check its permissions") from None
    return _read_parquet(path, key) if is_parquet else read_jsonl(path, key)


def _read_parquet(path: Path, key: str) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path, memory_map=True).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{key}: cannot read {path} as Parquet: {reason}; write the file again") from None
    if not rows:
        raise DataError(f"{key}: {path} is empty; expected rows; check the path")
    return _plain_rows(rows, str(path))


def read_jsonl(path: Path, key: str = "data") -> list[Row]:
    """One JSON object a line; blank lines are skipped. Raises DataError naming file and line."""
    rows: list[Row] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{path} line {number}"))
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error.strerror}; check its permissions") from None
    if not rows:
        raise DataError(f"{key}: {path} is empty; expected one JSON object per line; check the path")
    return rows


def _parse_line(line: bytes, origin: str) -> Row:
    try:
        text = line.decode("utf-8-sig")  # Windows editors put a byte order mark before the first line
        value = json.loads(text, parse_int=functools.partial(_read_whole_number, origin=origin))
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 (byte {error.start}); expected JSONL in UTF-8; convert it") from None
    except UnicodeEncodeError:
        raise refuse(origin, "a lone surrogate (\\ud800 to \\udfff)", "Unicode text", "fix the line") from None
    except RecursionError:
        raise DataError(f"{origin}: nested too deeply; expected a JSON object with named columns; fix it") from None
    except json.JSONDecodeError as error:
        got = f"not JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{origin}: {got}; expected one JSON object per line; fix the line") from None
    if not isinstance(value, dict):
        got = type(value).__name__
        raise DataError(f"{origin}: got {got}; expected a JSON object with named columns; fix the line")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        plain_columns(value, origin)  # refuses what is nested too deeply for whoever writes it again
    return Row(value, origin)


def _read_whole_number(text: str, *, origin: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise refuse_whole_number(origin) from None


def _load_hub(source: SourceConfig, key: str) -> list[Row]:
    from datasets import load_dataset

    name = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
    try:
        dataset = load_dataset(source.hub, source.subset, split=source.split)
    except Exception as error:  # the library raises its own errors, the hub's, and the network's
        reason = " ".join(str(error).split())
        do = f"check name, subset, split and network, or set {key}.path to a local file"
        raise DataError(f"{key}.hub: cannot load {name}, split {source.split}: {reason}; {do}") from error
    return _plain_rows(dataset, name)


def _generate(generator: Any, key: str) -> list[Row]:
    made = plugins.resolve_target(generator, {}, key)()
    if not isinstance(made, Sequence) or not all(isinstance(columns, Mapping) for columns in made):
        raise DataError(
            explain(key, type(made).__name__, "a list of mappings", "return one mapping of columns per row")
        )
    return _plain_rows(made, key)


def _plain_rows(rows: Iterable[Mapping[str, Any]], origin: str) -> list[Row]:
    """Rows as they would be read from JSON, so that a reward sees the same values before and after a resume."""
    origins = ((f"{origin} row {index}", columns) for index, columns in enumerate(rows))
    return [Row(plain_columns(columns, where), where) for where, columns in origins]


def _leave_out_repeats(rows: Iterable[Row], prompt_key: str) -> list[Row]:
    seen: set[str] = set()
    kept = []
    for row in rows:
        fingerprint = json.dumps(look_up(row, prompt_key), sort_keys=True, default=str)
        if fingerprint not in seen:
            seen.add(fingerprint)
            kept.append(row)
    return kept


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """The column ``key``; dots reach into it (``reward_model.ground_truth``). Raises DataError listing the columns."""
    value: Any = row
    if key in row:
        return row[key]
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            columns = ", ".join(map(str, row)) or "none"
            do = "set data.prompt_key or data.reference_key"
            raise DataError(f"{origin_of(row)}: no column {key!r}; its columns are {columns}; {do}")
        value = value[part]
    return value


def origin_of(row: Mapping[str, Any]) -> str:
    return getattr(row, "origin", "row")
