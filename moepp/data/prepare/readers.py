"""Documents out of text files: .txt, .jsonl and .json (one object a line), gzipped too, and .parquet, streamed."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from moepp.data.prepare.bad_lines import BadLineError, BadLines
from moepp.data.prepare.inputs import InputFile, has_kind
from moepp.data.remedies import read_remedy
from moepp.errors import DataError
from moepp.io.untrusted import open_regular, printable, show

TEXT_UNITS = ("file", "paragraph", "line")
# Tokenising takes about 100 bytes of memory for each byte of a document (measured, tokenizers 0.23): 1.7 GB for this.
MAX_DOCUMENT_BYTES = 16 << 20
SKIPPED_BYTES = 1 << 20  # read at once of what is left out
FIELDS_SHOWN = 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ReadOptions:
    """What a document is, and what becomes of those that are none.

    Raises:
        DataError: a value that cannot work.
    """

    text_fields: tuple[str, ...] = ("text",)  # of .jsonl and .parquet: the first that a document has is its text
    text_unit: str = "file"  # what a document is in .txt: "file", "paragraph" or "line"
    max_document_bytes: int = MAX_DOCUMENT_BYTES  # of a line in .jsonl, of a text elsewhere
    max_bad_lines: int = 0  # in all inputs together

    def __post_init__(self) -> None:
        if not all(self.text_fields) or len(set(self.text_fields)) != len(self.text_fields) or not self.text_fields:
            raise DataError(f"--text-field={','.join(self.text_fields)} names a field twice or none; write a or a,b")
        if self.max_document_bytes < 1:
            raise DataError(f"--max-document-bytes={self.max_document_bytes} is below 1; give a number of bytes")
        if self.max_bad_lines < 0:
            raise DataError(f"--max-bad-lines={self.max_bad_lines} is below 0; give how many may be left out")


@dataclass(frozen=True)
class Document:
    """One document, and how many bytes of its file were read to get at it (for progress)."""

    text: str
    bytes_read: int


class DocumentReader:
    """Reads files and counts what it finds: one for all files of one preparation.

    Attributes:
        bad_lines: lines, rows and texts that were left out.
        field_counts: how many documents had their text in each of the fields asked for.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.bad_lines = BadLines(options.max_bad_lines)
        self.field_counts = dict.fromkeys(options.text_fields, 0)

    def read(self, file: InputFile) -> Iterator[Document]:
        """Yield the documents of one file in order, empty ones included.

        Raises:
            DataError: unreadable, corrupt or changed, or more bad lines than allowed; names the file and the line.
        """
        path = printable(file.path)
        try:
            with open_regular(file.path) as raw:
                file.require_unchanged(os.fstat(raw.fileno()))
                yield from self._documents(raw, file)
                file.require_unchanged(os.stat(file.path))
        except (zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from error
        except MemoryError as error:
            raise DataError(f"{path} does not fit into memory; lower --max-document-bytes or --workers") from error
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {printable(error.strerror or error)}; {read_remedy(error)}"
            ) from error

    def _documents(self, raw: IO[bytes], file: InputFile) -> Iterator[Document]:
        if has_kind(file.path, ".parquet"):
            from moepp.data.prepare.tables import read_parquet  # pyarrow takes a while to import

            yield from read_parquet(raw, file, self)
            return
        stream: Any = gzip.GzipFile(fileobj=raw) if has_kind(file.path, ".gz") else raw
        as_text = has_kind(file.path, ".txt", ".txt.gz")
        texts = self._read_text(stream, file.path) if as_text else self._read_jsonl(stream, file.path)
        read = 0
        try:
            for text in texts:
                position = raw.tell()
                yield Document(text, position - read)
                read = position
        except EOFError:
            where = printable(file.path)
            torn = f"{where} is not a whole gzip file: its end is missing; fetch or compress it again"
            self.bad_lines.take(BadLineError(torn))

    def _lines(self, stream: IO[bytes], path: str) -> Iterator[tuple[str, bytes]]:
        """(where, line) of every line that is not too long, without its end and the byte-order mark of some editors."""
        number, limit = 0, self.options.max_document_bytes
        while line := stream.readline(limit + len(BYTE_ORDER_MARK) + 2):
            number += 1
            where = f"{printable(path)} line {number}"
            content = line.removesuffix(b"\n").removesuffix(b"\r")
            content = content.removeprefix(BYTE_ORDER_MARK) if number == 1 else content
            if len(content) <= limit:
                yield where, content
                continue
            self.bad_lines.take(_too_long(where, limit))
            while line and not line.endswith(b"\n"):
                line = stream.readline(SKIPPED_BYTES)

    def _read_text(self, stream: IO[bytes], path: str) -> Iterator[str]:
        unit = self.options.text_unit
        if unit == "file":
            yield from self._read_whole(stream, printable(path))
            return
        paragraph = _Paragraph(self.options.max_document_bytes)
        for where, line in self._lines(stream, path):
            try:
                text = _decode(line, where)
                if unit == "line":
                    yield text
                elif text.strip():
                    paragraph.add(text, where)
                elif paragraph.lines:
                    yield paragraph.take()
            except BadLineError as error:
                self.bad_lines.take(error)
        if paragraph.lines:
            yield paragraph.take()

    def _read_whole(self, stream: IO[bytes], where: str) -> Iterator[str]:
        limit = self.options.max_document_bytes
        content = stream.read(limit + len(BYTE_ORDER_MARK) + 1).removeprefix(BYTE_ORDER_MARK)
        try:
            if len(content) > limit:
                raise _too_long(where, limit, "give --text-unit paragraph or line, or raise --max-document-bytes")
            yield _decode(content, where).replace("\r\n", "\n").strip("\n")
        except BadLineError as error:
            self.bad_lines.take(error)

    def _read_jsonl(self, stream: IO[bytes], path: str) -> Iterator[str]:
        for where, line in self._lines(stream, path):
            if not line.strip():
                continue
            try:
                field, text = _text_of(_record(line, where), self.options.text_fields, where)
                _require_once(line, field, where)
            except BadLineError as error:
                self.bad_lines.take(error)
                continue
            self.field_counts[field] += 1
            yield text


class _Paragraph:
    """Lines up to a blank one, within the bound of a document."""

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = []
        self._bytes = 0
        self._limit = limit

    def add(self, text: str, where: str) -> None:
        self._bytes += len(text.encode()) + 1
        if self._bytes > self._limit + 1:
            self.take()
            remedy = "give --text-unit line, or raise --max-document-bytes"
            raise _too_long(f"the paragraph that reaches {where}", self._limit, remedy)
        self.lines.append(text)

    def take(self) -> str:
        text = "\n".join(self.lines)
        self.lines, self._bytes = [], 0
        return text


def _too_long(where: str, limit: int, remedy: str = "raise --max-document-bytes") -> BadLineError:
    return BadLineError(f"{where} is longer than --max-document-bytes={limit}; {remedy}")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "it is gzipped: name it .gz" if content.startswith(b"\x1f\x8b") else "convert it, for example with iconv"
        raise BadLineError(f"{where} is not UTF-8 (byte {error.start + 1}); {hint}") from error


# Numbers play no part here: integers of any length and NaN, which Python and pandas write, are let pass.
_RECORDS = json.JSONDecoder(parse_int=lambda _: 0, parse_constant=lambda _: 0.0)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = _RECORDS.decode(_decode(line, where))
    except json.JSONDecodeError as error:
        reason = "another value follows the first" if error.msg == "Extra data" else printable(error.msg)
        raise BadLineError(
            f"{where} is not JSON ({reason}, column {error.colno}); write one object a line, repair or remove the line"
        ) from error
    except RecursionError as error:
        raise BadLineError(f"{where} nests too many values inside one another; repair or remove the line") from error
    if isinstance(record, list):
        raise BadLineError(f"{where} is a JSON array; write one object a line, for example with `jq -c '.[]'`")
    if not isinstance(record, dict):
        raise BadLineError(f"{where} is {kind_of(record)}, not a JSON object; write one object a line")
    return record


def _text_of(record: dict[str, Any], fields: tuple[str, ...], where: str) -> tuple[str, str]:
    """Return the first field that is present and not null, and its text."""
    present = [name for name in fields if name in record]
    if not present:
        raise BadLineError(f"{where} has no field {missing(fields, list(record))}; name it with --text-field")
    field = next((name for name in present if record[name] is not None), None)
    if field is None:
        raise null_text(where, present)
    text = record[field]
    if not isinstance(text, str):
        raise BadLineError(f"{where}: field {show(field)} is {kind_of(text)}, not a text; name another --text-field")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadLineError(f"{where}: field {show(field)} holds half a surrogate pair; repair the line") from error
    return field, text


def missing(fields: tuple[str, ...], there: list[str]) -> str:
    """Return the wanted fields and, within bounds, the present ones."""
    more = f" and {len(there) - FIELDS_SHOWN:,} more" if len(there) > FIELDS_SHOWN else ""
    names = ", ".join(printable(name, 40) for name in there[:FIELDS_SHOWN])
    return f"{' or '.join(map(show, fields))} (it has {names or 'none'}{more})"


def null_text(where: str, fields: list[str]) -> BadLineError:
    """Return the error of a document whose text is null."""
    return BadLineError(f"{where}: field {' and '.join(map(show, fields))} is null; remove it")


def kind_of(value: object) -> str:
    """Return what JSON calls a value."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _require_once(line: bytes, field: str, where: str) -> None:
    """Refuse an object with two texts: JSON readers silently take the last."""
    if line.count(json.dumps(field, ensure_ascii=False).encode(errors="replace")) < 2:
        return
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = pairs  # objects are finished inside out

    json.JSONDecoder(parse_int=lambda _: 0, object_pairs_hook=keep).decode(line.decode("utf-8"))
    if [key for key, _ in outermost].count(field) > 1:
        raise BadLineError(f"{where} has the field {show(field)} twice; remove one of them")
