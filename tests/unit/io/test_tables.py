"""Tables of others: read as they are, or refused in one line and in little memory, whatever they claim."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moepp.errors import DataError, RunError
from moepp.io.tables import read_arrow, read_parquet, write_parquet

ROWS: list[dict[str, Any]] = [
    {"text": "one", "n": 1, "x": 0.5, "yes": True, "many": ["a", "b"], "choices": {"text": ["p"], "label": ["A"]}},
    {"text": None, "n": None, "x": None, "yes": None, "many": None, "choices": None},
    {"text": "ö" * 50, "n": -(2**60), "x": 1e300, "yes": False, "many": [], "choices": {"text": [], "label": [None]}},
]
LIMIT = 1 << 22


def write_arrow(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"row_group_size": 1},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=str,
)
def test_parquet_is_read_as_it_was_written(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [row | {"day": datetime.date(2024, 1, 2), "one": {"n": [1, 2]}, "none": None} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", **options)
    assert read_parquet(tmp_path / "a.parquet", LIMIT) == rows
    write_parquet(tmp_path / "b.parquet", rows)
    assert read_parquet(tmp_path / "b.parquet", LIMIT) == rows


def test_dictionaries_that_ended_early_and_several_groups_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"{n}" * 3, "many": [f"{n}" * 5, "x"], "one": {"t": [f"{n}"]}} for n in range(2000)]
    for name in ("snappy", "zstd", "gzip", "brotli", "lz4", "none"):
        options: dict[str, Any] = {"compression": name, "dictionary_pagesize_limit": 5000, "row_group_size": 700}
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", **options)
        assert read_parquet(tmp_path / "a.parquet", LIMIT) == rows


def test_every_kind_of_text_and_list_is_read(tmp_path: Path) -> None:
    texts = ["a", "", None, "a"]
    lists = [[1, 2], None, [], [3]]
    columns = {
        "large": pa.array(texts, pa.large_string()),
        "category": pa.array(texts).dictionary_encode(),
        "bytes": pa.array([b"a", b"", None, b"\xff"]),
        "lists": pa.array(lists, pa.large_list(pa.int8())),
        "pairs": pa.array([[1, 2]] * 4, pa.list_(pa.int8(), 2)),
        "map": pa.array([[("a", 1)], [], None, [("b", 2)]], pa.map_(pa.string(), pa.int8())),
        "numbers": pa.array([5, 5, 6, 6]).dictionary_encode(),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    assert read_parquet(tmp_path / "a.parquet", LIMIT) == table.to_pylist()
    assert read_arrow([tmp_path / "a.arrow", tmp_path / "a.arrow"], LIMIT) == table.to_pylist() * 2
    write_arrow(tmp_path / "b.arrow", table.slice(1, 2))
    assert read_arrow([tmp_path / "b.arrow"], LIMIT) == table.slice(1, 2).to_pylist()


def refusal(path: Path, limit: int = LIMIT) -> str:
    read = read_parquet if path.suffix == ".parquet" else lambda path, *rest: read_arrow([path], *rest)
    with pytest.raises(RunError) as caught:
        read(path, limit, RunError, "remove it")
    message = str(caught.value)
    assert message.startswith(f"cannot read {path}: ") and message.endswith("; remove it"), message
    assert message.isprintable() and len(message) < 500
    return message


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "array",
    [
        pa.array([LONG] * 100),
        pa.array([LONG] * 100).dictionary_encode(),
        pa.array([[LONG] * 100]),
        pa.array([{"a": {"b": [[LONG] * 10] * 10}}]),
        pa.array([[("key", LONG)] * 100], pa.map_(pa.string(), pa.string())),
        pa.array([LONG.encode()] * 100),
    ],
    ids=["text", "category", "list", "struct", "map", "bytes"],
)
def test_a_text_that_is_there_often_is_counted_each_time(tmp_path: Path, array: Any) -> None:
    pq.write_table(pa.table({"a": array}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        message = refusal(tmp_path / "a.parquet")
        assert re.search(r"it unfolds to 10,000,[03]00 bytes or values", message), message
        assert max(tracemalloc.get_traced_memory()[1], pool.max_memory()) < 3_000_000
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    if pa.types.is_dictionary(array.type):
        write_arrow(tmp_path / "a.arrow", pa.table({"a": array}))
        assert "it unfolds to 10,000,000 bytes" in refusal(tmp_path / "a.arrow")
    assert len(read_parquet(tmp_path / "a.parquet", 11_000_000)) == len(array)


def test_values_that_take_no_room_are_counted(tmp_path: Path) -> None:
    many = (1 << 24) + 1
    pq.write_table(pa.table({"a": pa.nulls(many)}), tmp_path / "nulls.parquet")
    pq.write_table(pa.table({"a": pa.array([[None] * 10], pa.list_(pa.bool_()))}), tmp_path / "list.parquet")
    write_arrow(tmp_path / "nulls.arrow", pa.table({"a": pa.nulls(many)}))
    write_arrow(tmp_path / "none.arrow", pa.table({"a": pa.nulls(0)}))
    fixed = pa.FixedSizeListArray.from_arrays(pa.nulls(many), many)
    write_arrow(tmp_path / "fixed.arrow", pa.table({"a": fixed}))
    for name in ("nulls.parquet", "nulls.arrow", "fixed.arrow"):
        assert (tmp_path / name).stat().st_size < 50_000
        assert "16,777,217 bytes or values" in refusal(tmp_path / name)
    assert read_parquet(tmp_path / "list.parquet", LIMIT) == [{"a": [None] * 10}]


def test_what_cannot_be_bounded_is_refused(tmp_path: Path) -> None:
    table = pa.table({"a": [LONG] * 3})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, column_encoding={"a": "DELTA_BYTE_ARRAY"})
    assert "its texts are written as differences" in refusal(tmp_path / "a.parquet")
    for compression in ("zstd", "lz4"):
        write_arrow(tmp_path / "a.arrow", table, compression=compression)
        assert "it is compressed; save it anew without compression" in refusal(tmp_path / "a.arrow")
    for array in (pa.RunEndEncodedArray.from_arrays([2**31 - 1], [1]), pa.array(["a"], pa.string_view())):
        write_arrow(tmp_path / "b.arrow", pa.table({"a": array}))
        assert "it has values of type" in refusal(tmp_path / "b.arrow") or "2,147,483,647" in refusal(
            tmp_path / "b.arrow"
        )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_what_is_no_table_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert "No such file" in refusal(path)
    path.mkdir()
    assert "not a regular file" in refusal(path)
    path.rmdir()
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)
    path.unlink()
    for content in (b"", b"PAR1", b"x" * 1000, b"PAR1" + b"\xff" * 100 + b"PAR1", b"\xff\xff\xff\xff\x7f\xff\xff\xff"):
        path.write_bytes(content)
        if content or suffix == "parquet":
            refusal(path)
    table = pa.Table.from_pylist(ROWS * 20)
    pq.write_table(table, path) if suffix == "parquet" else write_arrow(path, table)
    assert "larger than 100" in refusal(path, 100) or "more than 100" in refusal(path, 100)
    whole = path.read_bytes()
    read = read_parquet if suffix == "parquet" else lambda path, limit: read_arrow([path], limit)
    # Damaged: other rows or a refusal, and no other exception. Some footers end the process in pyarrow's own objects.
    for place in (*range(0, len(whole), 37), *range(700, 790, 2)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (0x55 if place % 2 else 1)]) + whole[place + 1 :])
        try:
            read(path, LIMIT)
        except DataError as error:
            assert str(error).isprintable()


def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"a": f"{n}"} for n in range(300_000)])
    program = """
import resource, sys
from pathlib import Path
import pyarrow.parquet, pyarrow.compute
from moepp.errors import DataError
from moepp.io.tables import read_parquet
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
try:
    read_parquet(Path(sys.argv[1]), 1 << 30)
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "does not fit into memory" in done.stdout, done.stderr


def test_state_json_names_files_of_its_own_folder_alone(tmp_path: Path) -> None:
    from moepp.evaluation.data import _shards

    for names in (["../a.arrow"], ["/etc/passwd"], [""], [".."], [], [1], None):
        found = None if names is None else [{"filename": name} for name in names]
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": found}))
        with pytest.raises(DataError, match="names no files of this folder"):
            _shards(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    assert _shards(tmp_path) == [tmp_path / "a.arrow"]
