"""metrics.jsonl: one JSON object per record, always with ``step`` and ``tokens``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.errors import RunError


class JsonlSink:
    """Appends records to a file and flushes each one, so that a killed run keeps all but the line in flight."""

    def __init__(self, path: Path, start_step: int = 0) -> None:
        """Open ``path`` for appending, without its records of steps after ``start_step``.

        Raises:
            RunError: the file cannot be written, or holds something else than records.
        """
        self._path = path
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        try:
            _drop_records_after(self._path, start_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"cannot write {self._path}: {error.strerror}; free the path or set another run.dir"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop the records of steps after ``step``; the next record goes behind what is left."""
        self._file.close()
        self._open(step)

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Append one line. JSON knows no NaN and no infinity: such values become null."""
        line = {"step": step, "tokens": tokens} | {name: _finite(value) for name, value in record.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; the unfinished last line of a killed run is left out.

    Raises:
        RunError: no such file, or a line that is not a record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}; name the directory of a run") from error
    *lines, _unfinished = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record["step"], int) and isinstance(record["tokens"], int)):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise RunError(
                f"{path} line {number} is not a JSON object with step and tokens; remove the line or the file"
            ) from None
        records.append(record)
    return records


def _drop_records_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text.encode() == path.read_bytes():
        return
    # Replaced in one go: a kill in between leaves the old file or the new one, never half of it.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
