"""Tables of rows as parquet files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.errors import RunError
from moepp.io import files

_MAX_BYTES = 256 << 20


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


def read_parquet(path: Path, columns: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Args:
        path: the file.
        columns: that must be there, and the types of their values.

    Raises:
        RunError: no such file, not parquet, or other columns or values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RunError(f"{path} is larger than {_MAX_BYTES >> 20} MiB; remove it")
        rows = pq.read_table(path, memory_map=False).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} is no table ({type(error).__name__}); remove it, or write it again") from error
    for row in rows:
        for name, kinds in columns.items():
            if not isinstance(row.get(name), kinds):
                raise RunError(f"{path} has no {name} in a row; remove it, or write it again")
    return rows
