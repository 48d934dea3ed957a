"""The texts of a .parquet file, row by row, within bounds that hold whatever the file claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from moepp.data.prepare.bad_lines import BadLineError
from moepp.data.prepare.inputs import InputFile
from moepp.data.prepare.readers import Document, missing, null_text
from moepp.errors import DataError
from moepp.io.parquet_pages import DELTAS, measure_pages
from moepp.io.untrusted import printable, show

if TYPE_CHECKING:
    from moepp.data.prepare.readers import DocumentReader

ROWS_PER_BATCH = 64
# Texts written as differences (DELTA_BYTE_ARRAY) cannot stay folded: a few bytes may give a long text in each row.
ROWS_PER_UNFOLDED_BATCH = 1
MAX_PAGE_BYTES = 1 << 30  # writers make pages of about 1 MB
# Text that repeats takes little room, but not this little (gzip at its best makes 1,032 bytes out of one).
MAX_UNFOLDING = 1_000
UNFOLDED_FREELY = 1 << 30


def read_parquet(raw: IO[bytes], file: InputFile, reader: DocumentReader) -> Iterator[Document]:
    """Yield the texts of the first of the text fields that each row has.

    Text columns are those of strings, also in dictionaries (pandas' category), as views or with long offsets.
    Dictionaries stay folded: a text that a million rows share is in memory once.

    Raises:
        DataError: not a parquet file, no such column, a column of another type, or more bad rows than allowed.
    """
    path, fields = printable(file.path), reader.options.text_fields
    try:
        footer = pyarrow.parquet.ParquetFile(raw)
        columns = _columns(footer, fields, path)
        pages = measure_pages(raw, columns, path)
        if pages.largest > MAX_PAGE_BYTES:
            raise DataError(f"{path} has a page of {pages.largest:,} bytes; write it with pages of about 1 MB")
        folded = [] if pages.encodings & DELTAS else _folded(footer, columns)
        table = pyarrow.parquet.ParquetFile(raw, read_dictionary=folded)
        yield from _rows(table, columns, ROWS_PER_BATCH if folded else ROWS_PER_UNFOLDED_BATCH, file, reader)
    except pyarrow.ArrowException as error:
        raise _broken(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _broken(path, error) from error  # what arrow says of corrupt compression


def _broken(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is not a whole parquet file ({printable(error, 200)}); fetch it again")


def _columns(table: Any, fields: tuple[str, ...], path: str) -> list[str]:
    schema = table.schema_arrow
    columns = [name for name in fields if name in schema.names]
    if not columns:
        raise DataError(f"{path} has no column {missing(fields, schema.names)}; name it with --text-field")
    for name in columns:
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has the column {show(name)} twice; write it with one of them")
        kind = schema.field(name).type
        if not _is_text(kind):
            raise DataError(
                f"{path}: column {show(name)} is of type {printable(kind, 60)}, not text; name another --text-field"
            )
    return columns


def _folded(footer: Any, columns: list[str]) -> list[str]:
    """Return the text columns to read as dictionaries; arrow cannot where texts are written as differences."""
    return [name for name in columns if not pyarrow.types.is_null(footer.schema_arrow.field(name).type)]


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _rows(
    table: Any, columns: list[str], batch_rows: int, file: InputFile, reader: DocumentReader
) -> Iterator[Document]:
    path = printable(file.path)
    bytes_per_row = file.bytes / max(table.metadata.num_rows, 1)
    allowed = max(UNFOLDED_FREELY, MAX_UNFOLDING * file.bytes)
    row = 0
    for batch in table.iter_batches(batch_size=batch_rows, columns=columns):
        arrays = [batch.column(name) for name in columns]
        for i in range(batch.num_rows):
            row += 1
            allowed -= 1
            try:
                field, text = _text(arrays, columns, i, reader.options.max_document_bytes, f"{path} row {row}")
            except BadLineError as error:
                reader.bad_lines.take(error)
                continue
            allowed -= len(text)
            if allowed < 0:
                raise DataError(
                    f"{path} unfolds to more than {MAX_UNFOLDING} times its {file.bytes:,} bytes by row {row}; "
                    "it repeats its texts: remove what is there twice"
                )
            reader.field_counts[field] += 1
            yield Document(text, int(row * bytes_per_row) - int((row - 1) * bytes_per_row))


def _text(arrays: list[Any], columns: list[str], i: int, limit: int, where: str) -> tuple[str, str]:
    for name, array in zip(columns, arrays, strict=True):
        scalar = array[i]
        if isinstance(scalar, pyarrow.DictionaryScalar):
            scalar = scalar.value  # of the dictionary, in place
        if not scalar.is_valid:
            continue
        if scalar.as_buffer().size > limit:
            raise BadLineError(f"{where} is longer than --max-document-bytes={limit}; raise it")
        try:
            return name, scalar.as_py()
        except UnicodeDecodeError as error:
            raise BadLineError(f"{where} is not UTF-8 (byte {error.start + 1}); repair it") from error
    raise null_text(where, columns)
