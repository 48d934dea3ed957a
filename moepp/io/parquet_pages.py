"""Sizes of the pages of a .parquet file, from the headers of the pages themselves: reading allocates what they claim.

The footer claims sizes too, but nothing makes it agree with the pages. Format: Thrift's compact protocol
(thrift/doc/specs/thrift-compact-protocol.md), struct PageHeader (apache/parquet-format, parquet.thrift): field 1 the
type, 2 the size of the page unfolded, 3 its size in the file, 5 and 8 the headers of data pages, whose field 1 is the
number of values.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NamedTuple

from moepp.errors import DataError

HEADER_BYTES = (1 << 12, 1 << 20, 1 << 26)  # read at once; a header with long statistics is tried again with more
SMALLEST_HEADER_BYTES = 6
TYPE, UNFOLDED, IN_FILE, DICTIONARY = 1, 2, 3, 2  # field numbers of PageHeader, and a value of the first
# Of the headers of data pages: their fields in PageHeader, and in them that of the encoding; field 1 counts values.
ENCODINGS, VALUES = {5: 2, 8: 4}, 1
DELTA_BYTE_ARRAY = 7
MAX_DICTIONARY_BYTES = 16 << 20  # of one that is looked into; writers end them at 1 MB
MAX_NESTING = 16

STOP, TRUE, FALSE, BYTE, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 6, 7, 8, 9, 10, 12


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


def measure_pages(
    raw: IO[bytes], metadata: Any, columns: Collection[str] | None, path: str, dictionaries: bool = False
) -> Pages:
    """Return the sizes of the pages of some columns, and how many values they hold.

    Args:
        raw: the file.
        metadata: pyarrow's FileMetaData of it.
        columns: by their paths; None: all.
        path: what messages call the file.
        dictionaries: look into them, for :attr:`Pages.copied`, which is empty without.

    Raises:
        DataError: the pages are not where the footer says.
    """
    size = os.fstat(raw.fileno()).st_size
    largest = total = values = 0
    left, copied, encodings = size // SMALLEST_HEADER_BYTES, dict[str, int](), set[int]()
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if columns is not None and chunk.path_in_schema not in columns:
                continue
            longest, values_before = 0, values
            for start, page in _pages(raw, chunk, size, path):
                largest, total = max(largest, page.unfolded), total + page.unfolded
                values, left = values + page.values, left - 1
                encodings |= set() if page.encoding is None else {page.encoding}
                if left < 0:  # more pages than fit into the file: chunks lie on top of one another
                    raise _broken(path)
                if dictionaries and page.is_dictionary and chunk.physical_type == "BYTE_ARRAY":
                    longest = max(longest, _longest(raw, start, page, chunk.compression))
            name = chunk.path_in_schema
            copied[name] = copied.get(name, 0) + longest * (values - values_before)
    return Pages(largest, total, values, copied if dictionaries else {}, frozenset(encodings))


def _pages(raw: IO[bytes], chunk: Any, size: int, path: str) -> Iterator[tuple[int, _Page]]:
    """Yield where the content of each page of a chunk begins, and the page."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end = start + chunk.total_compressed_size
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
            numbers = header.struct()
        except (IndexError, RecursionError):
            continue  # it may be longer than what was read
        inner = [(header.inner[field], encoding) for field, encoding in ENCODINGS.items() if field in header.inner]
        values = sum(numbers.get(VALUES, 0) for numbers, _ in inner)
        if min(numbers.get(UNFOLDED, -1), numbers.get(IN_FILE, -1), values) < 0:
            break
        encoding = inner[0][0].get(inner[0][1]) if inner else None
        is_dictionary = numbers.get(TYPE) == DICTIONARY
        return _Page(header.position, numbers[UNFOLDED], numbers[IN_FILE], values, encoding, is_dictionary)
    raise _broken(path)


def _longest(raw: IO[bytes], start: int, page: _Page, compression: str) -> int:
    """Return the bytes of the longest text of a dictionary, or all of its bytes, where that is not known."""
    if max(page.unfolded, page.in_file) > MAX_DICTIONARY_BYTES:
        return page.unfolded
    content: Any = os.pread(raw.fileno(), page.in_file, start)
    try:
        if compression not in ("UNCOMPRESSED", "NONE"):
            import pyarrow

            content = pyarrow.decompress(content, page.unfolded, compression.lower(), asbytes=True)
        longest = position = 0
        while position < len(content):  # the length of each, and itself
            (length,) = struct.unpack_from("<I", content, position)
            longest, position = max(longest, length), position + 4 + length
        return min(longest, page.unfolded)
    except (OSError, ValueError, struct.error):  # its kind of compression is not known, or it is damaged
        return page.unfolded


def _broken(path: str) -> DataError:
    return DataError(f"{path} is not a whole parquet file (its pages are not where its footer says); fetch it again")


class _Compact:
    """Reads the whole numbers of one struct and skips everything else. Raises IndexError at the end of the bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        self.inner: dict[int, dict[int, int]] = {}  # the whole numbers of structs in it, by their fields

    def struct(self, depth: int = 0) -> dict[int, int]:
        if depth > MAX_NESTING:
            raise IndexError("nested too deeply")
        numbers: dict[int, int] = {}
        field = 0
        while (head := self._byte()) != STOP:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            if BYTE < kind <= I64:
                numbers[field] = self._zigzag()
            elif kind == STRUCT:
                inner = self.struct(depth + 1)
                self.inner |= {field: inner} if depth == 0 else {}
            elif kind not in (TRUE, FALSE):
                self._skip(kind, depth)
        return numbers

    def _skip(self, kind: int, depth: int) -> None:
        if kind == STRUCT:
            self.struct(depth + 1)
        elif BYTE < kind <= I64:
            self._varint()
        elif kind in (TRUE, FALSE, BYTE):  # in lists, booleans take a byte
            self._advance(1)
        elif kind in (DOUBLE, BINARY):
            self._advance(8 if kind == DOUBLE else self._varint())
        elif kind in (LIST, SET):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            for _ in range(count):
                self._skip(head & 15, depth + 1)
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
