"""Sizes of the pages of a .parquet file, from the headers of the pages themselves: reading allocates what they claim.

The footer claims sizes too, but nothing makes it agree with the pages. It is read here, too: of some damaged footers,
pyarrow's own objects end the process. Format: Thrift's compact protocol (thrift/doc/specs/thrift-compact-protocol.md),
structs FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and PageHeader (apache/parquet-format, parquet.thrift).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NamedTuple

from moepp.errors import DataError

HEADER_BYTES = (1 << 12, 1 << 20, 1 << 26)  # read at once; a header with long statistics is tried again with more
MAX_FOOTER_BYTES = 1 << 26
SMALLEST_HEADER_BYTES = 6
MAX_DICTIONARY_BYTES = 16 << 20  # of one that is looked into; writers end them at 1 MB
MAX_NESTING = 16
DELTAS, DELTA_BYTE_ARRAY = {5, 6, 7}, 7  # encodings as differences; the last one repeats parts of the text before
BYTE_ARRAY, DICTIONARY = 6, 2  # a type of columns, a type of pages
CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}

STOP, TRUE, FALSE, BYTE, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 6, 7, 8, 9, 10, 12

# What is read of structs, by the numbers of their fields: int, bytes, a list of one of these, or a struct.
COLUMN = {1: int, 3: [bytes], 4: int, 7: int, 9: int, 11: int}
TYPE, NAMES, CODEC, SIZE, DATA_AT, DICTIONARY_AT = COLUMN
FOOTER = {4: [{1: [{3: COLUMN}]}]}
PAGE = {1: int, 2: int, 3: int, 5: {1: int, 2: int}, 8: {1: int, 4: int}}
KIND, UNFOLDED, IN_FILE = 1, 2, 3
ENCODING_OF = {5: 2, 8: 4}  # headers of data pages, and their field of the encoding; field 1 counts values


class Pages(NamedTuple):
    """What the headers of the pages of some columns say.

    Attributes:
        largest: size of the largest, decompressed, in bytes.
        unfolded: of all of them.
        values: in them.
        copied: bytes at most that the values of a column take whose pages have them in a dictionary, by its path.
        encodings: numbers of the encodings of data pages.
    """

    largest: int
    unfolded: int
    values: int
    copied: Mapping[str, int]
    encodings: frozenset[int]


class _Page(NamedTuple):
    """One page: bytes of its header, of itself decompressed and in the file; its values and encoding; or its kind."""

    header_bytes: int
    unfolded: int
    in_file: int
    values: int
    encoding: int | None
    is_dictionary: bool


def measure_pages(raw: IO[bytes], columns: Collection[str] | None, path: str, dictionaries: bool = False) -> Pages:
    """Return the sizes of the pages of some columns, and how many values they hold.

    Args:
        raw: the file.
        columns: by their paths; None: all.
        path: what messages call the file.
        dictionaries: look into them, for :attr:`Pages.copied`, which is empty without.

    Raises:
        DataError: the pages are not where the footer says.
    """
    size = os.fstat(raw.fileno()).st_size
    largest = total = values = 0
    left, copied, encodings = size // SMALLEST_HEADER_BYTES, dict[str, int](), set[int]()
    for name, chunk in _chunks(raw, size, path):
        if columns is not None and name not in columns:
            continue
        longest, values_before = 0, values
        for start, page in _pages(raw, chunk, size, path):
            largest, total = max(largest, page.unfolded), total + page.unfolded
            values, left = values + page.values, left - 1
            encodings |= set() if page.encoding is None else {page.encoding}
            if left < 0:  # more pages than fit into the file: chunks lie on top of one another
                raise _broken(path)
            if dictionaries and page.is_dictionary and chunk.get(TYPE) == BYTE_ARRAY:
                longest = max(longest, _longest(raw, start, page, CODECS.get(chunk.get(CODEC, 0))))
        copied[name] = copied.get(name, 0) + longest * (values - values_before)
    return Pages(largest, total, values, copied if dictionaries else {}, frozenset(encodings))


def _chunks(raw: IO[bytes], size: int, path: str) -> Iterator[tuple[str, dict[int, Any]]]:
    """Yield the column's path and the wanted fields of every ColumnMetaData of the footer."""
    (length,) = struct.unpack("<I4x", os.pread(raw.fileno(), 8, size - 8)) if size >= 12 else (0,)
    if not 0 < length <= min(MAX_FOOTER_BYTES, size - 12):
        raise _broken(path)
    try:
        footer = _Compact(os.pread(raw.fileno(), length, size - 8 - length)).struct(FOOTER)
    except (IndexError, RecursionError) as error:
        raise _broken(path) from error
    for group in footer.get(4, []):
        for column in group.get(1, []):
            chunk = column.get(3, {})
            yield b".".join(chunk.get(NAMES, [])).decode("utf-8", "replace"), chunk


def _pages(raw: IO[bytes], chunk: Mapping[int, Any], size: int, path: str) -> Iterator[tuple[int, _Page]]:
    """Yield where the content of each page of a chunk begins, and the page."""
    start = chunk.get(DATA_AT, -1)
    if chunk.get(DICTIONARY_AT, 0) > 0:
        start = min(start, chunk[DICTIONARY_AT])
    end = start + chunk.get(SIZE, -1)
    if not 0 <= start <= end <= size:
        raise _broken(path)
    while start < end:
        page = _page(raw, start, path)
        yield start + page.header_bytes, page
        start += page.header_bytes + page.in_file


def _page(raw: IO[bytes], start: int, path: str) -> _Page:
    for count in HEADER_BYTES:
        header = _Compact(os.pread(raw.fileno(), count, start))
        try:
            found = header.struct(PAGE)
        except (IndexError, RecursionError):
            continue  # it may be longer than what was read
        inner = [(found[field], encoding) for field, encoding in ENCODING_OF.items() if field in found]
        values = sum(numbers.get(1, 0) for numbers, _ in inner)
        if min(found.get(UNFOLDED, -1), found.get(IN_FILE, -1), values) < 0:
            break
        encoding = inner[0][0].get(inner[0][1]) if inner else None
        return _Page(header.position, found[UNFOLDED], found[IN_FILE], values, encoding, found.get(KIND) == DICTIONARY)
    raise _broken(path)


def _longest(raw: IO[bytes], start: int, page: _Page, codec: str | None) -> int:
    """Return the bytes of the longest text of a dictionary, or all of its bytes, where that is not known."""
    if codec is None or max(page.unfolded, page.in_file) > MAX_DICTIONARY_BYTES:
        return page.unfolded
    content: Any = os.pread(raw.fileno(), page.in_file, start)
    try:
        if codec:
            import pyarrow

            content = pyarrow.decompress(content, page.unfolded, codec, asbytes=True)
        longest = position = 0
        while position < len(content):  # the length of each, and itself
            (length,) = struct.unpack_from("<I", content, position)
            longest, position = max(longest, length), position + 4 + length
        return min(longest, page.unfolded)
    except (OSError, ValueError, struct.error):  # damaged
        return page.unfolded


def _broken(path: str) -> DataError:
    return DataError(f"{path} is not a whole parquet file (its pages are not where its footer says); fetch it again")


class _Compact:
    """Reads what is wanted of a struct and skips everything else. Raises IndexError at the end of the bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def struct(self, wanted: Mapping[int, Any], depth: int = 0) -> dict[int, Any]:
        if depth > MAX_NESTING:
            raise IndexError("nested too deeply")
        found: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) != STOP:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            if kind not in (TRUE, FALSE):
                value = self._value(kind, wanted.get(field), depth)
                if value is not None:
                    found[field] = value
        return found

    def _value(self, kind: int, wanted: Any, depth: int) -> Any:
        """Return a value of the kind that is wanted; None: it was skipped."""
        if BYTE < kind <= I64 and wanted is int:
            return self._zigzag()
        if kind == BINARY and wanted is bytes:
            length, start = self._varint(), self.position
            self._advance(length)
            return self.content[start : self.position]
        if kind == STRUCT and isinstance(wanted, dict):
            return self.struct(wanted, depth + 1)
        if kind == LIST and isinstance(wanted, list):
            count, kind = self._list_head()
            found = (self._value(kind, wanted[0], depth + 1) for _ in range(count))
            return [value for value in found if value is not None]
        self._skip(kind, depth)
        return None

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        return self._varint() if head >> 4 == 15 else head >> 4, head & 15

    def _skip(self, kind: int, depth: int) -> None:
        if depth > MAX_NESTING:
            raise IndexError("nested too deeply")
        if kind == STRUCT:
            self.struct({}, depth + 1)
        elif BYTE < kind <= I64:
            self._varint()
        elif kind in (TRUE, FALSE, BYTE):  # in lists, booleans take a byte
            self._advance(1)
        elif kind in (DOUBLE, BINARY):
            self._advance(8 if kind == DOUBLE else self._varint())
        elif kind in (LIST, SET):
            count, inner = self._list_head()
            for _ in range(count):
                self._skip(inner, depth + 1)
        else:
            raise IndexError(f"type {kind} has no part in a page header")

    def _byte(self) -> int:
        value = self.content[self.position]
        self.position += 1
        return value

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > len(self.content):
            raise IndexError("beyond the end")

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise IndexError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
