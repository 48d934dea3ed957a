"""Tables of rows: written as parquet; read from parquet and arrow files within bounds, whatever these claim."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moepp.errors import DataError, MoeppError
from moepp.io import files
from moepp.io.parquet_pages import DELTA_BYTE_ARRAY, measure_pages
from moepp.io.untrusted import OUT_OF_MEMORY, open_regular, printable, read_bytes

_MAX_VALUES = 1 << 24  # in all columns, lists and their items counted apart


class _RefusedError(Exception):
    pass


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns.

    Raises:
        WriteError: the file cannot be written.
    """
    files.write_whole(path, parquet_bytes(rows))


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows of the same columns as the content of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()


def read_parquet(
    path: Path, limit_bytes: int, error: type[MoeppError] = DataError, remedy: str = "give another file"
) -> list[dict[str, Any]]:
    """Return the rows of a parquet file of plain columns, lists and structs.

    Texts that many rows share are in the file once, so a small file can stand for any amount: what it says of itself is
    looked at before anything is read, and texts stay folded until their sum is known.

    Args:
        path: the file.
        limit_bytes: of the file, of its pages, and of the texts of all rows.
        error: class of the error.
        remedy: end of its message.

    Raises:
        error: no such file, not parquet, of other types, or larger.
    """

    def read() -> list[dict[str, Any]]:
        with open_regular(path) as raw:
            return _parquet_rows(raw, path, limit_bytes)

    return _explained(read, path, error, remedy)


def read_arrow(
    paths: Sequence[Path], limit_bytes: int, error: type[MoeppError] = DataError, remedy: str = "give another file"
) -> list[dict[str, Any]]:
    """Return the rows of streams of arrow batches, as ``Dataset.save_to_disk`` writes; see :func:`read_parquet`."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        data = read_bytes(path, limit_bytes, error, remedy)
        limit_bytes -= len(data)
        rows += _explained(lambda: _arrow_rows(data, limit_bytes), path, error, remedy)  # noqa: B023
    return rows


def _explained(read: Any, path: Path, error: type[MoeppError], remedy: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    try:
        return read()
    except MemoryError:  # arrow's own is one as well
        reason = OUT_OF_MEMORY
    # Beside arrow's own: corrupt compression (OSError), bad UTF-8 and dates (ValueError), no such type in Python.
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError, TypeError, struct.error) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
    except (_RefusedError, DataError) as problem:
        reason = str(problem)
    raise error(f"cannot read {printable(path)}: {printable(reason, 200)}; {remedy}")


def _parquet_rows(raw: IO[bytes], path: Path, limit_bytes: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    _require(os.fstat(raw.fileno()).st_size, limit_bytes)
    footer = pq.ParquetFile(raw)
    pages = measure_pages(raw, None, printable(path), dictionaries=True)
    columns = [footer.schema.column(i) for i in range(len(footer.schema))]
    widest = max((column.length for column in columns if column.physical_type == "FIXED_LEN_BYTE_ARRAY"), default=0)
    _require(max(pages.unfolded, pages.values * widest), limit_bytes)
    _require(max(pages.values, footer.metadata.num_rows), _MAX_VALUES)
    if DELTA_BYTE_ARRAY in pages.encodings:
        raise _RefusedError("its texts are written as differences; write them plainly, or in dictionaries")
    # Arrow keeps dictionaries of lists folded in simple cases alone: only where it could be too much otherwise.
    is_much = sum(pages.copied.values()) > limit_bytes
    table = pq.ParquetFile(raw, read_dictionary=[name for name, size in pages.copied.items() if is_much and size])
    groups = (table.read_row_group(i, use_threads=False) for i in range(footer.metadata.num_row_groups))
    return _rows((batch for group in groups for batch in group.to_batches()), limit_bytes)


def _arrow_rows(data: bytes, limit_bytes: int) -> list[dict[str, Any]]:
    import pyarrow as pa

    messages = pa.ipc.MessageReader.open_stream(data)
    for message in iter(_next_of(messages), None):
        if _is_compressed(bytes(message.metadata)):
            raise _RefusedError("it is compressed; save it anew without compression")
    return _rows(pa.ipc.open_stream(data), limit_bytes)


def _next_of(messages: Any) -> Any:
    def read() -> Any:
        try:
            return messages.read_next_message()
        except StopIteration:
            return None

    return read


def _rows(batches: Iterable[Any], limit_bytes: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    left, values_left = limit_bytes, _MAX_VALUES
    for batch in batches:
        batch.validate(full=True)
        _require(batch.num_rows, values_left)
        for column in batch.columns:
            count, size = _unfolded(column, left, values_left)
            left, values_left = left - size, values_left - count
        rows += batch.to_pylist()
    return rows


def _unfolded(array: Any, limit_bytes: int, most_values: int) -> tuple[int, int]:
    """Return how many values an array has, those of lists included, and the bytes of its texts in all rows.

    Raises:
        _RefusedError: more than the limits, or a type for which this is not known.
    """
    import pyarrow.compute
    from pyarrow import types

    pc: Any = pyarrow.compute  # its functions are made when it is imported
    kind, size, inner = array.type, 0, []
    _require(len(array), most_values)
    if types.is_dictionary(kind):
        if _is_text(kind.value_type):
            size = pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
        elif not types.is_primitive(kind.value_type):
            raise _RefusedError(f"it has values of type {kind}")
    elif _is_text(kind):
        size = pc.sum(pc.binary_length(array)).as_py() or 0
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _require(pc.sum(pc.list_value_length(array)).as_py() or 0, most_values)
        inner = [array.flatten()]
    elif types.is_struct(kind):
        inner = array.flatten()
    elif types.is_map(kind):
        inner = [array.keys, array.items]
    elif not (types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind)):
        raise _RefusedError(f"it has values of type {kind}")
    _require(size, limit_bytes)
    count = len(array)
    for one in inner:
        values, bytes_in = _unfolded(one, limit_bytes - size, most_values - count)
        count, size = count + values, size + bytes_in
    return count, size


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _require(found: int, limit: int) -> None:
    if found > limit:
        raise _RefusedError(f"it unfolds to {found:,} bytes or values, more than {max(limit, 0):,}")


def _is_compressed(message: bytes) -> bool:
    """Return whether the buffers behind the header of a message of arrow's stream format are compressed.

    Reading them takes the memory that each claims. Format: the flatbuffers of apache/arrow, format/Message.fbs.
    """
    header_type = _field(message, _offset(message, 0), 1)
    header = _field(message, _offset(message, 0), 2)
    if header_type is None or header is None or message[header_type] not in (2, 3):  # a schema has no buffers
        return False
    batch = _offset(message, header)
    if message[header_type] == 2:  # a dictionary is a batch with a number
        inner = _field(message, batch, 1)
        if inner is None:
            return False
        batch = _offset(message, inner)
    return _field(message, batch, 3) is not None


def _offset(message: bytes, place: int) -> int:
    return place + struct.unpack_from("<I", message, place)[0]


def _field(message: bytes, table: int, number: int) -> int | None:
    """Return where a field of a flatbuffer's table lies; None where it has none."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", message, vtable)[0]:
        return None
    place = struct.unpack_from("<H", message, vtable + 4 + 2 * number)[0]
    return table + place if place else None
