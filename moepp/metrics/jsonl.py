"""Files of one JSON object per line, always with ``step`` and ``tokens``: metrics.jsonl, and others like it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.io.owners import permissions
from moepp.io.untrusted import MAX_JSON_BYTES, OUT_OF_MEMORY, load_json, open_regular, printable

logger = logging.getLogger(__name__)

_MAX_BYTES = 8 << 30
MAX_COUNT = 10**18  # steps and tokens
MAX_VALUE = 1e100  # of a metric; fp32 ends at 3.4e38
_PIECE = 1 << 20

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
        if os.path.lexists(self._path):
            files.move(self._path, _free_name(self._path))
        with files.new_file(self._path) as stream:
            os.fchmod(stream.fileno(), permissions(os.fstat(self._file.fileno())))
            for position in range(0, size, _PIECE):
                stream.write(os.pread(self._file.fileno(), min(_PIECE, size - position), position))
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
    parse = parse if parse is not None else _parse
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size <= _MAX_BYTES:
                return _read_records(stream, path, parse)
        reason = f"it is larger than {_MAX_BYTES:,} bytes"
    except OSError as problem:
        reason = problem.strerror or str(problem)
    except MemoryError:
        reason = OUT_OF_MEMORY
    raise RunError(f"cannot read {printable(path)}: {printable(reason)}; name the directory of a run")


def _read_records(stream: IO[bytes], path: Path, parse: Parse) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    first_bad = lost = 0  # number of a line, and bytes from there on
    is_zeroed = True
    for number, (line, size) in enumerate(_lines(stream), start=1):
        record = parse(line)
        if record is not None and not first_bad:  # also one that lacks nothing but the end of its line
            records.append(record)
        elif record is not None and line.endswith(b"\n"):
            raise _no_record(path, first_bad)
        elif line.endswith(b"\n"):
            first_bad, lost, is_zeroed = first_bad or number, lost + size, is_zeroed and b"\0" in line
    if first_bad and not records and not is_zeroed:
        raise _no_record(path, first_bad)
    if first_bad:
        logger.warning("%s: its last %d bytes, from line %d on, are damaged and left out", path, lost, first_bad)
    return records


def _no_record(path: Path, number: int) -> RunError:
    return RunError(f"{path} line {number} is not a JSON object with step and tokens; remove the line or the file")


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield each line as the file has it now, and its bytes; of one that is too long for a record, a stand-in."""
    left = os.fstat(stream.fileno()).st_size
    while left > 0 and (line := stream.readline(min(left, MAX_JSON_BYTES))):
        size, is_long = len(line), len(line) == MAX_JSON_BYTES
        if is_long:
            more, line = line, b"\0" if b"\0" in line else b"?"
            while not more.endswith(b"\n") and size < left and (more := stream.readline(min(left - size, _PIECE))):
                size += len(more)
            line += b"\n" if more.endswith(b"\n") else b""
        left -= size
        yield line, size


def require_ascending(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse records that go back in steps or tokens, which a run drops before it goes on from an earlier step.

    Raises:
        RunError: where they do.
    """
    for before, after in pairwise(records):
        for name in ("step", "tokens"):
            if after[name] < before[name]:
                raise RunError(
                    f"{printable(path)} goes back from {name} {before[name]} to {after[name]}, which no run does; "
                    "remove the lines of one of the two runs"
                )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line; None if there is none with a step and tokens that training could have got to."""
    try:
        found = load_json(line, "record", RunError)
    except RunError as error:
        if isinstance(error.__cause__, MemoryError):  # nothing is wrong with the line
            raise MemoryError from error
        return None
    if not isinstance(found, dict) or any(type(found.get(name)) is not int for name in ("step", "tokens")):
        return None
    return found if all(0 <= found[name] <= MAX_COUNT for name in ("step", "tokens")) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl, what is not finite as None; None if there is none."""
    record = parse_line(line)
    if record is None or any(type(value) not in (int, float, type(None)) for value in record.values()):
        return None
    return {name: None if value is None else _finite(value) for name, value in record.items()}


def _drop_records_after(path: Path, step: int, parse: Parse) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path, parse) if record["step"] <= step]
    if not _holds(path, _texts(kept)):
        before = path.stat()
        with files.new_file(path) as stream:
            stream.writelines(_texts(kept))
        # When the file was changed last tells when the last record was written: no record is written here.
        with contextlib.suppress(OSError):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _texts(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    return ((json.dumps(record) + "\n").encode() for record in records)


def _holds(path: Path, texts: Iterable[bytes]) -> bool:
    try:
        with open_regular(path) as stream:
            return all(stream.read(len(text)) == text for text in texts) and not stream.read(1)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; look at its disk and permissions") from error


def _free_name(path: Path) -> Path:
    n = 1
    while os.path.lexists(name := path.with_name(f"{path.name}.replaced-{n}")):
        n += 1
    return name


def _finite(value: float) -> float | None:
    """Return None for what is not finite, or so large that sums and charts of it would not be."""
    return value if -MAX_VALUE < value < MAX_VALUE else None
