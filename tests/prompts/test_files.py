"""Data files as people have them, made by the tools that make them: their rows are those that were written."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.config import SourceConfig
from rlpost.errors import DataError
from rlpost.prompts import encoding
from rlpost.prompts.encoding import build_prompts
from rlpost.prompts.files import read_path
from tests.data_rows import read_rows
from tests.prompts.test_prompts import CharTokenizer

ROWS = [
    {"prompt": "2+2?", "answer": "4"},
    {"prompt": 'He said "hi",\nand left', "answer": "第七"},
    {"prompt": "naïve 😀", "answer": ""},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path):
    return read_rows(SourceConfig(path=str(path)))


def fails(path, text):
    with pytest.raises(DataError) as caught:
        read(path)
    assert text in str(caught.value) and str(caught.value).isprintable(), str(caught.value)


# -- one file ------------------------------------------------------------------------------------------------------


def with_pandas(write):
    def make(path):
        import pandas

        write(pandas.DataFrame(ROWS), path)

    return make


def with_datasets(write):
    def make(path):
        import datasets

        write(datasets.Dataset.from_list(ROWS), path)

    return make


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("d.jsonl", lambda path: path.write_bytes(LINES)),
        ("d.txt", lambda path: path.write_bytes(LINES)),  # the content decides
        ("array.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("indented.json", lambda path: path.write_text(json.dumps(ROWS, indent=4, ensure_ascii=False), "utf-8-sig")),
        ("d.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES))),
        ("d.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(LINES))),
        ("d.jsonl.xz", lambda path: path.write_bytes(lzma.compress(LINES))),
        ("array.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
        ("pandas.jsonl", with_pandas(lambda d, path: d.to_json(path, orient="records", lines=True))),
        ("pandas.json", with_pandas(lambda d, path: d.to_json(path, orient="records"))),
        ("pandas.jsonl.zst", with_pandas(lambda d, path: compress_zstd(d, path))),
        ("pandas.csv", with_pandas(lambda d, path: d.to_csv(path, index=False))),
        ("pandas.tsv", with_pandas(lambda d, path: d.to_csv(path, index=False, sep="\t"))),
        ("pandas.csv.gz", with_pandas(lambda d, path: d.to_csv(path, index=False))),
        ("windows.csv", with_pandas(lambda d, path: d.to_csv(path, index=False, encoding="utf-8-sig"))),
        ("pandas.parquet", with_pandas(lambda d, path: d.to_parquet(path))),
        ("datasets.jsonl", with_datasets(lambda d, path: d.to_json(path))),
        ("datasets.csv", with_datasets(lambda d, path: d.to_csv(path))),
        ("datasets.parquet", with_datasets(lambda d, path: d.to_parquet(path))),
        ("saved", with_datasets(lambda d, path: d.save_to_disk(path))),
    ],
)
def test_a_file_gives_back_the_rows_that_were_written(tmp_path, name, make):
    make(tmp_path / name)
    assert read(tmp_path / name) == ROWS


def compress_zstd(frame, path):
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(frame.to_json(orient="records", lines=True).encode())


@given(
    rows=st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), min_size=2, max_size=2),
        min_size=1,
    ),
    tab=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_csv_values_are_text_as_they_were_written(tmp_path_factory, rows, tab):
    path = tmp_path_factory.getbasetemp() / f"any.{'tsv' if tab else 'csv'}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if tab else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["prompt", "answer"], *rows])
    assert [[row["prompt"], row["answer"]] for row in read(path)] == rows


VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=3)


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=3), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_an_array_has_the_rows_that_json_reads(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    try:
        path.write_text(text, "utf-8")
    except UnicodeEncodeError:
        return
    assert read(path) == json.loads(text)


def test_numbers_in_csv_stay_text(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,answer\nq,007\nr,1e3\ns,NA\nt,\n")
    assert [row["answer"] for row in read(tmp_path / "d.csv")] == ["007", "1e3", "NA", ""]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("d.json", b'[{"a": 1}, {"a": }]', "line 1: not JSON (Expecting value at column 18)"),
        ("d.json", b'[{"a": 1},\n\n{"a": 2} {"a": 3}]', "line 3: neither a comma nor the end of the array"),
        ("d.json", b'[{"a": 1},\n', "line 2: not JSON (Expecting value"),
        ("d.json", b'[\n{"a": 1}', "line 2: neither a comma nor the end"),
        ("d.json", b'[{"a": 1},]', "not JSON (Expecting value"),
        ("d.json", b'[{"a": 1}]\n{"a": 2}', "something behind the end of the array"),
        ("d.json", b"[]", "is empty"),
        ("d.json", b'[\n{"a": 1},\n 3]', "line 3: got int; expected a JSON object"),
        ("d.json", '[{"a": "é"}]'.encode("latin-1"), "not UTF-8"),
        ("d.json", b'{"data": [\n{"a": 1}]}', "line 1: not JSON"),
        ("d.csv", b"prompt,answer\na,b\nc\n", "line 3: got 1 values; expected 2, one for each column"),
        ("d.csv", b'prompt,answer\n"a\nb",c\nd,e,f\n', "line 4: got 3 values"),
        ("d.csv", b'prompt,answer\n"a"b,c\n', "line 2: not CSV"),
        ("d.csv", b'prompt,answer\n"a,c\n', "not CSV (unexpected end of data)"),
        ("d.csv", b",prompt\n0,a\n", "a column without a name"),
        ("d.csv", b"a,a\n0,a\n", "a name twice"),
        ("d.csv", b"prompt\n\xe9\n", "line 2: not UTF-8"),
        ("d.jsonl", b"x" * 3, "line 1: not JSON"),
        ("d.csv", b"prompt,answer\n", "is empty"),
        ("d.csv", b"", "is empty"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "damaged gzip"),
        ("d.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("d.jsonl", b"PK\x03\x04....", "is a ZIP archive"),
        ("d.parquet", b"PAR1....", "cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    fails(tmp_path / name, text)


def test_a_file_that_changes_while_the_run_reads_it_is_noticed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES)
    rows = read_path(str(path))
    path.write_bytes(LINES.replace(b"2+2", b"2+3"))
    with pytest.raises(DataError, match=r"d\.jsonl line 1: the file changed"):
        rows[0]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"line 3: the file changed"):
        rows[2]
    path.write_bytes(LINES)
    rows = read_path(str(path))
    path.unlink()  # or replaced by another file: the one that was opened is still there
    assert list(rows) == ROWS


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 200_000))
    full = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115  what is tested closes it
    monkeypatch.setattr("tempfile.TemporaryFile", lambda prefix: full)
    fails(tmp_path / "d.jsonl.gz", "No space left on device")


# -- several files -------------------------------------------------------------------------------------------------


def test_folders_and_globs(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "_hidden.jsonl").write_text("not JSON")
    rows = read(tmp_path)
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert [row.origin.removeprefix(f"{tmp_path}/") for row in rows] == [
        "a.jsonl line 1",
        "a.jsonl line 3",
        "b.jsonl line 1",
    ]
    assert [row["n"] for row in read(tmp_path / "[b-z].jsonl")] == [3]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.jsonl").write_text('{"n": 4}\n')
    assert [row["n"] for row in read(tmp_path / "**" / "[a-c].jsonl")] == [1, 2, 3, 4]
    fails(tmp_path / "*.jsonl", "_hidden.jsonl line 1: not JSON")  # a glob means what it says

    (tmp_path / "deep" / "c.csv").write_text("n\n5\n")
    (tmp_path / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"n": 6}\n'))
    fails(tmp_path / "deep", "files of several kinds (CSV, JSON)")
    fails(tmp_path / "*.parquet", "no file matches")
    fails(tmp_path / "deep" / "none", "nothing there")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "a folder without data files")
    (tmp_path / "b.jsonl").write_text("")
    fails(tmp_path / "[ab].jsonl", "b.jsonl is empty")


def test_a_name_with_signs_of_a_glob_is_that_file(tmp_path):
    (tmp_path / "data[1].jsonl").write_text('{"n": 1}\n')
    assert read(tmp_path / "data[1].jsonl") == [{"n": 1}]


def test_the_splits_of_a_saved_dataset_are_named(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "both")
    fails(tmp_path / "both", "several splits")
    assert read(tmp_path / "both" / "train") == ROWS


def test_files_of_one_folder_may_have_columns_of_their_own(tmp_path):
    import pandas

    pandas.DataFrame([{"a": 1}]).to_parquet(tmp_path / "1.parquet")
    pandas.DataFrame([{"b": "x"}]).to_parquet(tmp_path / "2.parquet")
    assert read(tmp_path) == [{"a": 1}, {"b": "x"}]


# -- sequences of rows ---------------------------------------------------------------------------------------------


def test_rows_index_slice_and_repeat(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"n": {n}, "p": {n % 3}}}\n' for n in range(10)))
    (tmp_path / "e.jsonl").write_text('{"n": 10, "p": 5}\n')
    rows = read_path(str(tmp_path / "*.jsonl"))
    assert len(rows) == 11 and rows[-1]["n"] == 10 and rows[9]["n"] == 9 and rows[10]["n"] == 10
    assert [row["n"] for row in rows[8:]] == [8, 9, 10] and [row["n"] for row in rows[8:][1:]] == [9, 10]
    assert [row["n"] for row in rows.choose(np.array([10, 0]))[:]] == [10, 0]
    for index in (11, -12):
        with pytest.raises(IndexError):
            rows[index]
    assert [row["n"] for row in read_rows(SourceConfig(path=str(path), unique=True), prompt_key="p")] == [0, 1, 2]


def test_prompts_of_a_large_source_are_made_again_and_are_the_same(tmp_path, monkeypatch):
    from rlpost.config import DataConfig

    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"prompt": "{"x" * (n % 7)}{n}", "answer": "{n}", "more": {n}}}\n' for n in range(50)))
    data = DataConfig(long_prompts="drop")

    def build():
        return build_prompts(read_path(str(path)), data, CharTokenizer(), max_prompt_tokens=6)

    kept = build()
    monkeypatch.setattr(encoding, "KEPT_PROMPTS", 10)
    lazy = build()
    assert isinstance(kept.prompts, list) and not isinstance(lazy.prompts, list)
    assert len(lazy.prompts) == len(kept.prompts) == 50 - lazy.num_dropped and lazy.num_dropped > 0
    assert (lazy.digest, lazy.max_tokens, lazy.weight) == (kept.digest, kept.max_tokens, kept.weight)
    for one, other in zip(kept.prompts, lazy.prompts, strict=True):
        assert (one.text, one.reference, one.columns) == (other.text, other.reference, other.columns)
        assert one.token_ids.tolist() == other.token_ids.tolist()
    assert [p.text for p in lazy.prompts[3:5]] == [p.text for p in kept.prompts[3:5]]


def test_a_million_rows_do_not_become_a_million_dicts(tmp_path):
    """200,000 rows of 200 bytes: as dicts they would take more than 100 MB."""
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        for n in range(200_000):
            file.write(json.dumps({"prompt": f"{n} " + "words " * 25, "answer": str(n), "level": 3}) + "\n")
    code = (
        "import sys, resource\n"
        "from rlpost.prompts.files import read_path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = read_path(sys.argv[1])\n"
        "total = sum(len(row) for row in rows)\n"
        "print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env={**os.environ}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    total, kilobytes = map(int, done.stdout.split())
    assert total == 600_000 and kilobytes < 30_000  # 32 bytes a row are 6.4 MB


def test_no_byte_of_csv_is_taken_for_a_mark_but_the_first(tmp_path):
    (tmp_path / "D.TSV").write_bytes("\ufeffprompt\tanswer\n\ufeffa\tb\n".encode())
    assert read(tmp_path / "D.TSV") == [{"prompt": "\ufeffa", "answer": "b"}]


def test_categories_of_parquet_are_their_values_in_every_part(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parts = [pyarrow.table({"kind": pyarrow.array(names).dictionary_encode()}) for names in (["a", "b"], ["c", "a"])]
    with parquet.ParquetWriter(tmp_path / "d.parquet", parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    assert read(tmp_path / "d.parquet") == [{"kind": "a"}, {"kind": "b"}, {"kind": "c"}, {"kind": "a"}]


def test_what_python_cannot_hold_and_what_would_vanish_is_one_line(tmp_path):
    import pyarrow
    from pyarrow import parquet

    far = pyarrow.array([0, 1 << 55], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"when": far}), tmp_path / "far.parquet")
    fails(tmp_path / "far.parquet", "far.parquet row 1: cannot be read")
    twice = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    fails(tmp_path / "twice.parquet", "two columns named a")


def test_a_path_that_no_file_can_have_and_a_folder_that_may_not_be_read(tmp_path):
    fails("x" * 5000, "File name too long")
    (tmp_path / "locked").mkdir()
    code = (
        "import os, sys\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "from rlpost.errors import DataError\n"
        "from rlpost.prompts.files import read_path\n"
        "try: read_path(sys.argv[1])\n"
        "except DataError as error: print(error)\n"
    )
    if os.geteuid() != 0 or not os.access(sys.executable, os.X_OK):
        return
    (tmp_path / "locked").chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", "import rlpost.prompts.files\n" + code, str(tmp_path / "locked")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "cannot look at" in done.stdout and "Permission denied" in done.stdout, done.stderr


def test_more_files_than_may_be_open_at_once_by_default(tmp_path):
    for n in range(80):
        (tmp_path / f"{n:03}.jsonl").write_text(f'{{"n": {n}}}\n')
    code = (
        "import resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2]) or hard))\n"
        "from rlpost.errors import DataError\n"
        "from rlpost.prompts.files import read_path\n"
        "try: print(sum(row['n'] for row in read_path(sys.argv[1])))\n"
        "except DataError as error: print(error)\n"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path), hard], capture_output=True, text=True, timeout=60)
        for hard in ("0", "60")
    ]
    assert outputs[0].stdout == "3160\n", outputs[0].stderr
    assert "Too many open files; raise the limit of open files" in outputs[1].stdout
