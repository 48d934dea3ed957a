"""Files of one JSON object per line, always with ``step`` and ``tokens``: metrics.jsonl, and others like it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.io.untrusted import load_json, read_bytes

logger = logging.getLogger(__name__)

_MAX_BYTES = 8 << 30

Parse = Callable[[bytes], "dict[str, Any] | None"]
"""Returns what a line holds; None where it is not such a line."""


class JsonlSink:
    """Appends records to a file, each at once, so that a killed run keeps all but the line in flight.

    What cannot be written, because the disk is full for the time being, is kept and written later: a checkpoint that
    fills the disk must not end the run, nor leave a gap in its metrics. A file that was removed or replaced is put
    back with all that it held: the open one still has it.
    """

    def __init__(self, path: Path, start_step: int = 0, parse: Parse | None = None) -> None:
        """Open ``path`` for appending, without its records of steps after ``start_step``.

        ``parse``: of its lines; None: records of metrics.

        Raises:
            RunError: the file cannot be written, or holds something else than records.
        """
        self._path = path
        self._parse = parse if parse is not None else _parse
        self._unwritten = b""
        self._lost = False
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        try:
            _drop_records_after(self._path, start_step, self._parse)
            self._file = files.open_append(self._path)
            self._size = os.fstat(self._file.fileno()).st_size
        except WriteError as error:
            raise RunError(str(error)) from error

    def rewind(self, step: int) -> None:
        """Drop the records of steps after ``step``; the next record goes behind what is left."""
        self.close()
        self._open(step)

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Append one line. JSON knows no NaN and no infinity: such values become null."""
        self.write({"step": step, "tokens": tokens} | {name: _finite(value) for name, value in record.items()})

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, which holds ``step`` and ``tokens`` and no NaN."""
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
            RunError: there is still no space for it, or records were lost because somebody truncated the file.
        """
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"{self._path} lacks its last {len(self._unwritten)} bytes: {error.strerror}; free the disk and "
                "continue from the newest checkpoint"
            ) from error
        finally:
            self._file.close()
        if self._lost:
            raise RunError(
                f"{self._path} was truncated while the run wrote it and lacks records; all else of the run is whole"
            )

    def _write(self) -> None:
        self._put_back()
        while self._unwritten:
            written = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[written:]
            self._size += written

    def _put_back(self) -> None:
        """Make sure that the open file is still the one at its path, and has what was written to it."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self._size:
            logger.error("%s was truncated from %d to %d bytes: records are lost", self._path, self._size, size)
            self._lost, self._size = True, size
        if files.is_at(self._file.fileno(), self._path):
            return
        logger.warning("%s was removed or replaced while the run wrote it: its records are written again", self._path)
        content = os.pread(self._file.fileno(), size, 0)
        if os.path.lexists(self._path):
            files.move(self._path, _free_name(self._path))
        files.write_whole(self._path, content)
        file = files.open_append(self._path)
        self._file.close()
        self._file = file


def read_records(path: Path, parse: Parse | None = None) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, or with ``parse`` the lines of another such file.

    Its end may be damaged: the unfinished last line of a killed run is left out, and so, with a warning, are lines
    that a power failure has left torn or zeroed after the last whole record.

    Raises:
        RunError: no such file, or a line that is not a record although a record follows, or no record at all.
    """
    *lines, unfinished = read_bytes(path, _MAX_BYTES, RunError, "name the directory of a run").split(b"\n")
    parse = parse if parse is not None else _parse
    found = [parse(line) for line in lines]
    whole = max((number for number, record in enumerate(found, start=1) if record is not None), default=0)
    records = [record for record in found[:whole] if record is not None]
    if len(records) < whole or (found and not records and not _is_zeroed(lines)):
        number = found.index(None) + 1
        raise RunError(f"{path} line {number} is not a JSON object with step and tokens; remove the line or the file")
    if whole < len(found):
        lost = sum(len(line) + 1 for line in lines[whole:])
        logger.warning("%s: its last %d bytes, from line %d on, are damaged and left out", path, lost, whole + 1)
    elif (last := parse(unfinished)) is not None:  # all of it but the end of the line
        records.append(last)
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line; None if there is none with a step and tokens."""
    try:
        found = load_json(line, "record", RunError)
    except RunError:
        return None
    if not isinstance(found, dict) or any(type(found.get(name)) is not int for name in ("step", "tokens")):
        return None
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl; None if there is none."""
    record = parse_line(line)
    if record is None:
        return None
    return record if all(type(value) in (int, float, type(None)) for value in record.values()) else None


def _is_zeroed(lines: list[bytes]) -> bool:
    return all(b"\0" in line for line in lines)


def _drop_records_after(path: Path, step: int, parse: Parse) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path, parse) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text.encode() != path.read_bytes():
        files.write_whole(path, text)


def _free_name(path: Path) -> Path:
    n = 1
    while os.path.lexists(name := path.with_name(f"{path.name}.replaced-{n}")):
        n += 1
    return name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
