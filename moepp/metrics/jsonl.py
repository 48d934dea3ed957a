"""metrics.jsonl: one JSON object per record, always with ``step`` and ``tokens``."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.errors import RunError

logger = logging.getLogger(__name__)


class JsonlSink:
    """Appends records to a file, each at once, so that a killed run keeps all but the line in flight.

    What cannot be written, because the disk is full for the time being, is kept and written later: a checkpoint that
    fills the disk must not end the run, nor leave a gap in its metrics.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        """Open ``path`` for appending, without its records of steps after ``start_step``.

        Raises:
            RunError: the file cannot be written, or holds something else than records.
        """
        self._path = path
        self._unwritten = b""
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        try:
            _drop_records_after(self._path, start_step)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(
                f"cannot write {self._path}: {error.strerror}; free the path or set another run.dir"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop the records of steps after ``step``; the next record goes behind what is left."""
        self.close()
        self._open(step)

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Append one line. JSON knows no NaN and no infinity: such values become null."""
        line = {"step": step, "tokens": tokens} | {name: _finite(value) for name, value in record.items()}
        is_first_failure = not self._unwritten
        self._unwritten += (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if is_first_failure:
                logger.warning("cannot write %s now, records are kept in memory: %s", self._path, error.strerror)

    def sync(self) -> None:
        """Force the records to the disk, as those of a checkpoint that is being saved must be."""
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("cannot write %s now: %s", self._path, error.strerror)

    def close(self) -> None:
        """Write what is left.

        Raises:
            RunError: there is still no space for it.
        """
        try:
            self._write()
        except OSError as error:
            raise RunError(
                f"{self._path} lacks its last {len(self._unwritten)} bytes: {error.strerror}; free the disk and "
                "continue from the newest checkpoint"
            ) from error
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


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
