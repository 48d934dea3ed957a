"""Documents out of files: bad lines, text fields, bounds, and what JSON and parquet have in store."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moepp.data.prepare import tables
from moepp.data.prepare.inputs import find_inputs
from moepp.data.prepare.readers import DocumentReader, ReadOptions
from moepp.errors import DataError
from moepp.io.parquet_pages import measure_pages

GOOD = b'{"text": "good"}\n'


def _read(path: Path, **options: Any) -> tuple[list[str], DocumentReader]:
    reader = DocumentReader(ReadOptions(**options))
    return [document.text for file in find_inputs([str(path)]).files for document in reader.read(file)], reader


def _read_bytes(tmp_path: Path, content: bytes, name: str = "a.jsonl", **options: Any) -> list[str]:
    (tmp_path / name).write_bytes(content)
    return _read(tmp_path / name, **options)[0]


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        _read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 600
    return message


BAD_LINES = {
    "broken": (b'{"text": ', "is not JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "another value follows the first, column 14"),
    "one array": (b'[{"text": "a"}, {"text": "b"}]', "is a JSON array; write one object a line"),
    "a number": (b"3", "is a number, not a JSON object"),
    "first line of a pretty object": (b"{", "write one object a line"),
    "bad UTF-8": (b'{"text": "\xff"}', r"is not UTF-8 (byte 11)"),
    "null": (b'{"text": null}', "field 'text' is null; remove it, or leave such lines out with --max-bad-lines"),
    "number": (b'{"text": 3.5}', "field 'text' is a number, not a text"),
    "big number": (b'{"text": ' + b"9" * 5000 + b"}", "field 'text' is a number"),
    "NaN": (b'{"text": NaN}', "field 'text' is a number"),
    "boolean": (b'{"text": true}', "field 'text' is a boolean"),
    "list": (b'{"text": ["a"]}', "field 'text' is a list"),
    "object": (b'{"text": {"a": 1}}', "field 'text' is an object"),
    "surrogate": (rb'{"text": "\ud800"}', "half a surrogate pair"),
    "no field": (b'{"body": "a"}', "has no field 'text' (it has body); name it with --text-field"),
    "escape in a field": (b'{"\\u001b[2J": "a"}', r"has no field 'text' (it has \x1b[2J)"),
    "twice": (b'{"text": "a", "text": "b"}', "has the field 'text' twice"),
    "deep": (b'{"text": "hi", "meta": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nests too many values"),
    "long": (b'{"text": "' + b"a" * 500_000 + b'"}', "is longer than --max-document-bytes=450000"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_ends_the_work_or_is_left_out_and_listed(tmp_path: Path, line: bytes, message: str) -> None:
    path, limit = tmp_path / "a.jsonl", 450_000
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    refusal = _refusal(path, max_document_bytes=limit)
    assert f"{path} line 2" in refusal and message in refusal
    texts, reader = _read(path, max_bad_lines=1, max_document_bytes=limit)
    assert texts == ["good", "good"]
    assert reader.bad_lines.count == 1 and f"{path} line 2" in reader.bad_lines.first[0]


def test_the_limit_of_bad_lines_holds_over_all_inputs(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD + b"{}\n")
    assert _read(tmp_path, max_bad_lines=3)[1].bad_lines.count == 3
    message = _refusal(tmp_path, max_bad_lines=2)
    assert "more than --max-bad-lines=2 bad lines" in message and "c.jsonl line 2" in message


def test_torn_gzip_keeps_what_is_whole_and_damaged_gzip_is_refused(tmp_path: Path) -> None:
    import random

    lines = b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(99) for i in range(9000))
    path, whole = tmp_path / "a.jsonl.gz", gzip.compress(lines)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole gzip file: its end is missing" in _refusal(path)
    texts, reader = _read(path, max_bad_lines=1)
    assert [json.loads(line)["text"] for line in lines.splitlines()][: len(texts)] == texts
    assert 3000 < len(texts) < 6000 and reader.bad_lines.count == 1
    for damaged in (whole[:-8] + b"\0" * 8, whole + b"garbage", whole[:5000] + b"\xff" * 99 + whole[5099:]):
        path.write_bytes(damaged)
        assert "is not a whole gzip file" in _refusal(path, max_bad_lines=9999)


def test_numbers_of_other_fields_do_not_matter(tmp_path: Path) -> None:
    content = b'{"text": "a", "id": ' + b"7" * 5000 + b', "score": NaN, "low": -Infinity, "high": 1e999}'
    assert _read_bytes(tmp_path, content) == ["a"]


def test_the_same_key_elsewhere_is_no_second_text(tmp_path: Path) -> None:
    content = b'{"meta": {"text": "x", "more": [{"text": 1, "text": 2}]}, "text": "a \\"text\\" b", "other": "text"}'
    assert _read_bytes(tmp_path, content) == ['a "text" b']


def test_byte_order_marks_and_line_ends_are_no_text(tmp_path: Path) -> None:
    assert _read_bytes(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r"}') == ["a", "b\r"]
    assert _read_bytes(tmp_path, b"\xef\xbb\xbfa\r\nb\rc\n", "a.txt") == ["a\nb\rc"]
    assert _read_bytes(tmp_path, b"\xef\xbb\xbfa\r\nb\rc\n", "a.txt", text_unit="line") == ["a", "b\rc"]


def test_the_first_text_field_that_is_there_counts(tmp_path: Path) -> None:
    rows = [{"a": "1", "b": "x"}, {"b": "2"}, {"a": None, "b": "3"}, {"b": None, "a": "4"}, {"c": "y", "a": "5"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, reader = _read(tmp_path, text_fields=("a", "b", "c"))
    assert texts == ["1", "2", "3", "4", "5"] and reader.field_counts == {"a": 3, "b": 2, "c": 0}
    (tmp_path / "a.jsonl").unlink()
    table = {name: [row.get(name) for row in rows] for name in ("a", "b", "c")}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    texts, reader = _read(tmp_path, text_fields=("a", "b", "none"))
    assert texts == ["1", "2", "3", "4", "5"] and reader.field_counts == {"a": 3, "b": 2, "none": 0}


@pytest.mark.parametrize("fields", [("",), ("a", ""), ("a", "a"), ()])
def test_text_fields_must_be_names(fields: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="names a field twice or none"):
        ReadOptions(text_fields=fields)


def test_missing_fields_are_named_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"field{i}": i for i in range(50_000)}))
    message = _refusal(tmp_path)
    assert "field9 and 49,990 more" in message and "field10" not in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_a_gzip_that_unfolds_to_one_endless_line_is_refused_in_bounded_memory(
    tmp_path: Path, name: str, unit: str
) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as stream:
        for _ in range(40):
            stream.write(b"a" * (1 << 20))
    tracemalloc.start()
    message = _refusal(tmp_path / name, max_document_bytes=1 << 20, text_unit=unit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "is longer than --max-document-bytes=1048576" in message
    assert peak < 16 << 20


def test_a_paragraph_without_end_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n\n" + "line\n" * 1000 + "\nshort\n")
    options: dict[str, Any] = {"text_unit": "paragraph", "max_document_bytes": 1000}
    assert "is longer than --max-document-bytes=1000; give --text-unit line" in _refusal(tmp_path, **options)


# Parquet


def _write_column(path: Path, array: Any, **options: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text.raw": ["no"] * len(array), "text": array}), path, **options)


TEXTS = ["a", "", None, "naïve", "a"]
KINDS = {
    "string": pyarrow.array(TEXTS),
    "large_string": pyarrow.array(TEXTS, pyarrow.large_string()),
    "string_view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "category": pyarrow.array(TEXTS).dictionary_encode(),
    "large category": pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("array", KINDS.values(), ids=KINDS)
def test_every_kind_of_text_column_is_read(tmp_path: Path, array: Any) -> None:
    _write_column(tmp_path / "a.parquet", array)
    assert "row 3: field 'text' is null" in _refusal(tmp_path)
    texts, reader = _read(tmp_path, max_bad_lines=1)
    assert texts == ["a", "", "naïve", "a"] and reader.bad_lines.count == 1
    assert _read(tmp_path, text_fields=("text.raw",))[0] == ["no"] * 5


@pytest.mark.parametrize("values", [[["a"]], [b"a"], [{"x": "a"}], [1], [1.5], [True]], ids=str)
def test_columns_of_other_types_are_refused(tmp_path: Path, values: Sequence[object]) -> None:
    _write_column(tmp_path / "a.parquet", pyarrow.array(values))
    assert "column 'text' is of type" in _refusal(tmp_path, max_bad_lines=99)


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_every_encoding_of_text_is_read(tmp_path: Path, encoding: str) -> None:
    texts = [f"prefix {i}" * (i % 3) for i in range(300)]
    _write_column(
        tmp_path / "a.parquet",
        pyarrow.array(texts),
        use_dictionary=False,
        column_encoding={"text": encoding, "text.raw": "PLAIN"},
        row_group_size=77,
    )
    assert _read(tmp_path)[0] == texts


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}])
def test_a_small_parquet_that_unfolds_far_stays_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x" * 4_000_000] * 64})
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    del table
    assert path.stat().st_size < 1_000_000
    before = pyarrow.total_allocated_bytes()
    reader, longest = DocumentReader(ReadOptions()), 0
    for document in reader.read(find_inputs([str(path)]).files[0]):
        assert len(document.text) == 4_000_000
        longest = max(longest, pyarrow.total_allocated_bytes() - before)
    assert reader.field_counts == {"text": 64}
    assert longest < 64_000_000  # unfolded they take 256 MB
    assert "row 1 is longer than --max-document-bytes" in _refusal(path, max_document_bytes=1000)
    monkeypatch.setattr(tables, "UNFOLDED_FREELY", 0)
    if path.stat().st_size < 1000:
        assert "unfolds to more than 1000 times its" in _refusal(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_pages_are_measured_by_their_own_headers(tmp_path: Path, version: str, compression: str) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"n": range(5000), "text": [f"{i}" * 40 for i in range(5000)]})
    pyarrow.parquet.write_table(
        table, path, data_page_version=version, compression=compression, row_group_size=900, data_page_size=5000
    )
    with path.open("rb") as raw:
        metadata = pyarrow.parquet.ParquetFile(raw).metadata
        chunks = [metadata.row_group(i).column(1) for i in range(metadata.num_row_groups)]
        largest, unfolded, values, copied, _ = measure_pages(raw, ["text"], str(path), dictionaries=True)
        # Independently: no page is larger than its chunk, and a dictionary holds the texts with 4 bytes each.
        assert largest <= max(chunk.total_uncompressed_size for chunk in chunks)
        assert largest >= 900 * (4 + 40) * 0.9
        headers = 100 * metadata.num_row_groups * 10  # the footer's sizes include those of pages, below 100 bytes each
        assert 0 <= sum(chunk.total_uncompressed_size for chunk in chunks) - unfolded < headers
        assert values == 5000 and copied == {"text": 40 * (3 * 900 + 4 * 4100)}


def test_a_page_that_claims_gigabytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_column(tmp_path / "a.parquet", pyarrow.array(["a" * 3000]))
    monkeypatch.setattr(tables, "MAX_PAGE_BYTES", 2000)
    monkeypatch.setattr(tables, "_rows", None)  # not reached
    assert "has a page of 3,004 bytes" in _refusal(tmp_path)
