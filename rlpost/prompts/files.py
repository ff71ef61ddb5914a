"""Rows of files: JSONL, a JSON array, CSV and TSV, Parquet, folders that ``datasets`` saved, and what is compressed.

A text file's rows stay in the file: where each begins is kept, and a row is parsed each time it is asked for. They are
not converted to Arrow, which has one type for a column and would fill in missing keys. Parquet becomes memory-mapped
Arrow. ``pyarrow`` and ``datasets`` are imported only in the functions that need them. Called by ``prompts.sources``.
"""

from __future__ import annotations

import array
import csv
import errno
import functools
import glob
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rlpost.errors import DataError
from rlpost.prompts.conversion import MAX_DEPTH, plain_columns, refuse, refuse_whole_number
from rlpost.prompts.rows import Row, Rows, chain, plain_rows

KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
PARQUET = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors put it before the first line
WHAT_TO_DO = {
    errno.ENOSPC: "make room in the folder for temporary files, or set TMPDIR to another",
    errno.EDQUOT: "make room in the folder for temporary files, or set TMPDIR to another",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`), or use fewer files",
}
NO_SPACE = re.compile(r"[^ \t\r\n]")
EXPECTED = "a JSONL, JSON, CSV or Parquet file, a folder or a glob of them"


def read_path(path: str, key: str = "data") -> Rows:
    """The rows of a file, of a folder's files or of a glob's, in the order of their names.

    Raises DataError, one line that names the file and, where possible, the line, for what cannot be read.
    """
    try:
        files = find_files(path, key)
    except OSError as error:
        raise DataError(f"{key}: cannot look at {path}: {error.strerror}; check the path") from None
    _allow_open_files(len(files))
    return chain([_read_file(file, key) for file in files])


def _allow_open_files(number: int) -> None:
    """Each text file stays open. The usual limit of 1,024 may be raised by whoever runs into it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def find_files(path: str, key: str = "data") -> list[Path]:
    """The files that ``path`` names, sorted by name; a folder that ``datasets`` saved is one.

    In a folder, files of other kinds and those whose names begin with a dot or an underscore do not count. Raises
    DataError where there is none, and for a folder with files of several kinds: which are meant, a glob can say.
    """
    named = Path(path)
    if named.is_file() or _is_saved(named):
        return [named]
    if named.is_dir():
        found = sorted(file for file in named.iterdir() if file.name[0] not in "._" and _kind(file) and file.is_file())
        kinds = sorted({_kind(file) for file in found})
        if len(kinds) > 1:
            got = f"files of several kinds ({', '.join(kinds)})"
            raise DataError(f"{key}: {got} in {path}; expected one kind; name them with a glob, such as {path}/*.jsonl")
        if (named / "dataset_dict.json").is_file():
            raise DataError(f"{key}: several splits in {path}; expected one; add the split's folder to the path")
        if not found:
            raise DataError(f"{key}: a folder without data files at {path}; expected {EXPECTED}; check the path")
        return found
    if not glob.has_magic(path):
        raise DataError(f"{key}: nothing there at {path}; expected {EXPECTED}; check the path")
    found = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
    if not found:
        raise DataError(f"{key}: no file matches {path}; expected {EXPECTED}; check the path")
    return found


def _kind(file: Path) -> str:
    name = file.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return KINDS.get(Path(name).suffix, "")


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _read_file(path: Path, key: str) -> Rows:
    """The content decides the kind, except that CSV and TSV are known by their names."""
    try:
        rows = _read_saved(path, key) if path.is_dir() else _read_content(path, key)
    except OSError as error:
        do = WHAT_TO_DO.get(error.errno or 0, "check the file")
        raise DataError(f"{key}: cannot read {path}: {error.strerror or error}; {do}") from None
    if not len(rows):
        raise DataError(f"{key}: {path} is empty; expected rows; check the path")
    return rows


def _read_content(path: Path, key: str) -> Rows:
    with path.open("rb") as file:
        beginning = file.read(6)
        if beginning.startswith(PARQUET):
            return _read_parquet(path, key)
        method = next((name for magic, name in COMPRESSED.items() if beginning.startswith(magic)), "")
        if not method:
            return _index(path, file, key)
    with _decompress(path, method) as file:
        return _index(path, file, key)


def _index(path: Path, file: IO[bytes], key: str) -> Rows:
    file.seek(0)
    if _kind(path) == "CSV":
        return _index_csv(path, file)
    beginning = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    if beginning.startswith(PARQUET):
        raise DataError(f"{key}: {path} is Parquet inside another compression; decompress it")
    if beginning.startswith(b"PK\x03\x04"):
        raise DataError(f"{key}: {path} is a ZIP archive; expected {EXPECTED}; unpack it")
    return _index_array(path, file) if beginning.startswith(b"[") else _index_lines(path, file)


def _decompress(path: Path, method: str) -> IO[bytes]:
    """The content, in a temporary file without a name."""
    import bz2
    import gzip
    import lzma
    import zlib

    plain = tempfile.TemporaryFile(prefix="rlpost-data-")  # noqa: SIM115  the caller closes it
    try:
        with _open_compressed(path, method, {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}) as content:
            shutil.copyfileobj(content, plain, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        plain.close()
        raise DataError(f"{path}: damaged {method}: {error}; copy the file again") from None
    return plain


def _open_compressed(path: Path, method: str, openers: dict[str, Callable[..., Any]]) -> Any:
    if method == "zstd":
        import pyarrow  # Python has no decoder of its own before 3.14

        return pyarrow.input_stream(str(path), compression="zstd")
    return openers[method](path, "rb")


# -- text: rows that stay in their file ---------------------------------------------------------------------------


class _Spans:
    """Where the rows of a file are, and what they were when they were found: 32 bytes a row."""

    def __init__(self, path: Path, file: IO[bytes], parse: Callable[[bytes, str], Row]) -> None:
        self._path, self._parse = path, parse
        self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._starts, self._sizes = array.array("q"), array.array("q")
        self._lines, self._digests = array.array("q"), array.array("q")

    def add(self, start: int, content: bytes, line: int) -> None:
        self._starts.append(start)
        self._sizes.append(len(content))
        self._lines.append(line)
        self._digests.append(hash(content))

    def rows(self) -> Rows:
        return Rows(len(self._starts), self.read)

    def read(self, index: int) -> Row:
        origin = f"{self._path} line {self._lines[index]}"
        try:
            content = os.pread(self._fd, self._sizes[index], self._starts[index])
        except OSError as error:
            raise DataError(f"{origin}: cannot be read: {error.strerror}; check the disk") from None
        if hash(content) != self._digests[index]:
            raise DataError(f"{origin}: the file changed while it was being read; start again with a finished file")
        return self._parse(content, origin)


def _index_lines(path: Path, file: IO[bytes]) -> Rows:
    """JSONL: one object a line; blank lines do not count."""
    spans = _Spans(path, file, _parse_object)
    start = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            spans.add(start, line, number)
        start += len(line)
    return spans.rows()


def _index_array(path: Path, file: IO[bytes]) -> Rows:
    """One JSON array of objects, however it is laid out."""
    text = _decode(file.read(), str(path), "JSON")
    spans = _Spans(path, file, _parse_object)
    decoder = json.JSONDecoder(parse_int=str)  # only an item's end matters here
    file.seek(0)
    place = _Place(text, start=len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0)

    def fail(got: str) -> DataError:
        return DataError(f"{path} line {place.line}: {got}; expected a JSON array of objects; fix the file")

    place.move(place.next_sign(0) + 1)
    sign = text[place.next_sign(place.position) :][:1]
    while sign != "]":
        place.move(place.next_sign(place.position))
        try:
            _, end = decoder.raw_decode(text, place.position)
        except RecursionError:
            raise fail("nested too deeply") from None
        except json.JSONDecodeError as error:
            place.move(error.pos)
            raise fail(f"not JSON ({error.msg} at column {error.colno})") from None
        spans.add(place.start, text[place.position : end].encode("utf-8"), place.line)
        place.move(place.next_sign(end))
        sign = text[place.position : place.position + 1]
        if sign not in ("]", ","):
            raise fail("neither a comma nor the end of the array behind an item")
        if sign == ",":
            place.move(place.position + 1)
    if text[place.next_sign(place.position) + 1 :].strip():
        raise fail("something behind the end of the array")
    return spans.rows()


class _Place:
    """A position in a text, moving forward, with its line and its offset in bytes."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.position, self.line, self.start = text, 0, 1, start

    def move(self, position: int) -> None:
        passed = self.text[self.position : position]
        self.start += len(passed.encode("utf-8"))
        self.line += passed.count("\n")
        self.position = position

    def next_sign(self, position: int) -> int:
        """The first position from ``position`` on that is not white space."""
        match = NO_SPACE.search(self.text, position)
        return match.start() if match else len(self.text)


def _index_csv(path: Path, file: IO[bytes]) -> Rows:
    """CSV (TSV: tabs) with a header; every value is text, exactly as it is written."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    taken = [0]  # bytes of the lines read so far

    def lines() -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            taken[0] += len(line)
            plain = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            yield _decode(plain, f"{path} line {number}", "CSV", "utf-8")

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header = _next_record(reader, path)
    if header is None:
        return Rows(0, lambda index: Row({}, ""))
    if not all(header) or len(set(header)) < len(header):
        do = "leave the row numbers out" if not all(header) else "rename one"
        raise refuse(f"{path} line 1", "a column without a name, or a name twice", "a header with names", do)
    spans = _Spans(path, file, functools.partial(_parse_record, header=header, delimiter=delimiter))
    start, line = taken[0], reader.line_num + 1
    while (record := _next_record(reader, path)) is not None:
        if record:
            if len(record) != len(header):
                got = f"{len(record)} values"
                raise refuse(f"{path} line {line}", got, f"{len(header)}, one for each column", "fix the line")
            content = os.pread(file.fileno(), taken[0] - start, start)
            spans.add(start, content, line)
        start, line = taken[0], reader.line_num + 1
    return spans.rows()


def _next_record(reader: Any, path: Path) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: not CSV ({error}); fix the line") from None


def _parse_record(content: bytes, origin: str, *, header: list[str], delimiter: str) -> Row:
    text = io.StringIO(content.decode("utf-8"), newline="")
    return Row(dict(zip(header, next(csv.reader(text, delimiter=delimiter, strict=True)), strict=True)), origin)


def _decode(content: bytes, origin: str, kind: str, encoding: str = "utf-8-sig") -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 (byte {error.start}); expected {kind} in UTF-8; convert it") from None


def _parse_object(content: bytes, origin: str) -> Row:
    text = _decode(content, origin, "JSONL")
    try:
        value = json.loads(text, parse_int=functools.partial(_read_whole_number, origin=origin))
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
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
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        plain_columns(value, origin)  # refuses what is nested too deeply for whoever writes it again
    return Row(value, origin)


def _read_whole_number(text: str, *, origin: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise refuse_whole_number(origin) from None


# -- Arrow ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, key: str) -> Rows:
    """The rows as Arrow, memory-mapped from an uncompressed temporary file without a name."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file, tempfile.NamedTemporaryFile(prefix="rlpost-") as plain:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                repeated = next(name for name in names if names.count(name) > 1)
                raise refuse(str(path), f"two columns named {repeated}", "a name for each", "rename one")
            schema = pyarrow.schema([_without_dictionary(field) for field in file.schema_arrow])
            with pyarrow.ipc.new_file(plain, schema) as writer:
                for batch in file.iter_batches():
                    writer.write_table(pyarrow.Table.from_batches([batch]).cast(schema))
            plain.flush()
            table = pyarrow.ipc.open_file(pyarrow.memory_map(plain.name)).read_all()
    except pyarrow.ArrowException as error:
        raise _explain_arrow(error, path, key, "Parquet") from None
    return plain_rows(_ArrowRows(table), str(path))


def _without_dictionary(field: Any) -> Any:
    """A categorical column as its values: parts of a file may number them differently."""
    import pyarrow

    is_dictionary = pyarrow.types.is_dictionary(field.type)
    return field.with_type(field.type.value_type) if is_dictionary else field


class _ArrowRows(Sequence[dict[str, Any]]):
    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def _read_saved(path: Path, key: str) -> Rows:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's errors, the library's own, and those of its JSON files
        raise _explain_arrow(error, path, key, "a saved dataset") from None
    return plain_rows(table, str(path))


def _explain_arrow(error: Exception, path: Path, key: str, what: str) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{key}: cannot read {path} as {what}: {reason}; write it again")
