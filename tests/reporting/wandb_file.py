"""What an offline W&B run wrote, read back from its ``.wandb`` files: the records of W&B's own protocol."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflinePart:
    """One file: a run, or the part of it between a start and an end."""

    run: Any
    metrics: list[Any] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by name, in order


def read_runs(folder: Path) -> list[OfflinePart]:
    """The parts below ``folder``, oldest first."""
    return [read_part(file) for file in sorted(folder.glob("offline-run-*/*.wandb"))]


def read_part(file: Path) -> OfflinePart:
    records = read_records(file)
    (run,) = [r.run for r in records if r.HasField("run")][:1]
    part = OfflinePart(run=run)
    for record in records:
        if record.HasField("metric"):
            part.metrics.append(record.metric)
        elif record.HasField("alert"):
            part.alerts.append(record.alert)
        elif record.HasField("artifact"):
            part.artifacts.append(record.artifact)
        elif record.HasField("request") and record.request.HasField("log_artifact"):
            part.artifacts.append(record.request.log_artifact.artifact)
        elif record.HasField("history"):
            part.history.append(_row(record.history.item))
    for row in part.history:
        for name, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "table-file":
                table = json.loads((file.parent / "files" / value["path"]).read_text())
                part.tables.setdefault(name, []).append(table)
    return part


def read_records(file: Path) -> list[Any]:
    """Every record: LevelDB's log format (blocks of 32 KiB) after a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, 7
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    records, pending, at = [], b"", header
    while at + header <= len(data):
        if block - at % block < header:  # too little left in the block for a header: padding
            at += block - at % block
            continue
        _crc, length, kind = struct.unpack("<IHB", data[at : at + header])
        pending += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(pending))
            pending = b""
    return records


def _row(items: Any) -> dict[str, Any]:
    """A history row with nested keys put together again."""
    row: dict[str, Any] = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        value = json.loads(item.value_json)
        if len(keys) == 1:
            row[keys[0]] = value
        else:
            row.setdefault(keys[0], {})[keys[-1]] = value
    return row
