"""Documents out of text files: .txt, .txt.gz, .jsonl, .jsonl.gz and .parquet, streamed."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from moepp.errors import DataError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_UNITS = ("file", "paragraph", "line")
PARQUET_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Document:
    """One document, and how many bytes of its file were read to get at it (for progress)."""

    text: str
    bytes_read: int


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """Files named by files, folders (searched through, sorted by path) and glob patterns; each file once, in order.

    Raises:
        DataError: nothing matches, or a file of another kind was named.
    """
    found: dict[str, None] = {}
    for entry in inputs:
        if os.path.isdir(entry):
            paths = _files_below(entry)
            problem = f"folder {entry} holds no file ending in {', '.join(SUFFIXES)}; name another"
        elif os.path.isfile(entry):
            paths, problem = [entry], ""
        else:
            paths = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
            problem = f"input {entry} matches no file below {os.getcwd()}; check its spelling"
        if not paths:
            raise DataError(problem)
        found.update(dict.fromkeys(paths))
    for path in found:
        if not path.endswith(SUFFIXES):
            raise DataError(f"input {path} does not end in {', '.join(SUFFIXES)}; convert or rename it")
    return list(found)


def read_documents(path: str, text_field: str = "text", text_unit: str = "file") -> Iterator[Document]:
    """The documents of one file in order, empty ones included.

    Args:
        text_field: field of .jsonl objects, column of .parquet tables.
        text_unit: what a document is in a .txt: the whole 'file', a 'paragraph' (between blank lines) or a 'line'.

    Raises:
        DataError: unreadable, corrupt, not UTF-8, or without the field; names the file and the line.
    """
    try:
        if path.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
            return
        with open(path, "rb") as raw, _decompressed(raw, path) as stream:
            documents = (
                _read_jsonl(stream, path, text_field)
                if path.endswith((".jsonl", ".jsonl.gz"))
                else _read_text(stream, path, text_unit)
            )
            read = 0
            for text in documents:
                position = raw.tell()
                yield Document(text, position - read)
                read = position
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the file") from error


def _files_below(folder: str) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(parent, name) for name in names if not name.startswith(".") and name.endswith(SUFFIXES)]
    return sorted(paths)


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw  # pyright: ignore[reportReturnType]


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); convert it, for example with iconv") from error


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; without the byte-order mark that some editors put before the first."""
    for number, line in enumerate(stream, start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _read_text(stream: IO[bytes], path: str, unit: str) -> Iterator[str]:
    if unit == "file":
        content = stream.read().removeprefix(b"\xef\xbb\xbf")
        yield _decode(content, path).replace("\r\n", "\n").strip("\n")
        return
    paragraph: list[str] = []
    for number, line in _lines(stream):
        text = _decode(line, f"{path} line {number}").rstrip("\r\n")
        if unit == "line":
            yield text
        elif text.strip():
            paragraph.append(text)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _read_jsonl(stream: IO[bytes], path: str, text_field: str) -> Iterator[str]:
    for number, line in _lines(stream):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(_decode(line, where))
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}); repair or remove the line") from error
        yield _text_of(record, text_field, where)


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object; write one object with a {text_field!r} field a line")
    if text_field not in record:
        raise DataError(f"{where} has no field {text_field!r} (it has {', '.join(record)}); name it with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a text; name another field")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {text_field!r} holds half a surrogate pair; repair the line") from error
    return text


def _read_parquet(path: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(f"{path} has no column {text_field!r} (it has {', '.join(names)}); use --text-field")
            kind = table.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column {text_field!r} is of type {kind}, not text; name another column")
            bytes_per_row = os.path.getsize(path) / max(table.metadata.num_rows, 1)
            row = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS_PER_BATCH, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f"{path} row {row}: column {text_field!r} is null; remove the row")
                    yield Document(text, int(row * bytes_per_row) - int((row - 1) * bytes_per_row))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is not a whole parquet file ({' '.join(str(error).split())}); fetch it again"
        ) from error
