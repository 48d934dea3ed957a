"""Sizes of the pages of a .parquet file, from the headers of the pages themselves: reading allocates what they claim.

The footer claims sizes too, but nothing makes it agree with the pages. Format: Thrift's compact protocol
(thrift/doc/specs/thrift-compact-protocol.md), struct PageHeader (apache/parquet-format, parquet.thrift): field 1 the
type, 2 the size of the page unfolded, 3 its size in the file.
"""

from __future__ import annotations

import os
from typing import IO, Any

from moepp.errors import DataError

HEADER_BYTES = (1 << 12, 1 << 20, 1 << 26)  # read at once; a header with long statistics is tried again with more
SMALLEST_HEADER_BYTES = 6
UNFOLDED, IN_FILE = 2, 3  # field numbers of PageHeader
MAX_NESTING = 16

STOP, TRUE, FALSE, BYTE, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 6, 7, 8, 9, 10, 12


def largest_page(raw: IO[bytes], metadata: Any, columns: list[str], path: str) -> int:
    """Return the decompressed size of the largest page of some columns, bytes.

    Args:
        metadata: pyarrow's FileMetaData of the file ``raw``.

    Raises:
        DataError: the pages are not where the footer says.
    """
    size = os.fstat(raw.fileno()).st_size
    largest, left = 0, size // SMALLEST_HEADER_BYTES
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.path_in_schema not in columns:
                continue
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            end = start + chunk.total_compressed_size
            if not 0 <= start <= end <= size:
                raise _broken(path)
            while start < end:
                header_bytes, unfolded, in_file = _page(raw, start, path)
                start += header_bytes + in_file
                largest, left = max(largest, unfolded), left - 1
                if left < 0:  # more pages than fit into the file: chunks lie on top of one another
                    raise _broken(path)
    return largest


def _page(raw: IO[bytes], start: int, path: str) -> tuple[int, int, int]:
    """Return the sizes of the header at ``start`` and of its page, decompressed and in the file, bytes."""
    for count in HEADER_BYTES:
        header = _Compact(os.pread(raw.fileno(), count, start))
        try:
            numbers = header.struct()
        except (IndexError, RecursionError):
            continue  # it may be longer than what was read
        if min(numbers.get(UNFOLDED, -1), numbers.get(IN_FILE, -1)) < 0:
            break
        return header.position, numbers[UNFOLDED], numbers[IN_FILE]
    raise _broken(path)


def _broken(path: str) -> DataError:
    return DataError(f"{path} is not a whole parquet file (its pages are not where its footer says); fetch it again")


class _Compact:
    """Reads the whole numbers of one struct and skips everything else. Raises IndexError at the end of the bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

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
